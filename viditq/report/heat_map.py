"""Heat map of a sensitivity search: what each block and role costs in each segment, at each bit-width.

Legend: G groups (block and role), S segments.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from viditq.files import atomic
from viditq.report.budget_curve import in_decibels

MAX_LABELS = 60  # more rows are labelled in part


def panels(search: Mapping[str, Any]) -> dict[tuple[str, int], np.ndarray]:
    """(side, bits) -> costs [G, S] of search.json, noise level falling from left to right as sampling goes."""
    rows = {group["name"]: i for i, group in enumerate(search["groups"])}
    num_segments = len(search["edges"]) - 1
    found: dict[tuple[str, int], np.ndarray] = {}
    for c in search["candidates"]:
        panel = found.setdefault((c["side"], c["bits"]), np.full((len(rows), num_segments), np.nan))
        panel[rows[c["group"]], num_segments - 1 - c["segment"]] = c["output"]
    return found


def chosen_bits(search: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """side -> bits [G, S] of the found plan, in the same order; 0 where a group never runs."""
    rows = {group["name"]: i for i, group in enumerate(search["groups"])}
    num_segments = len(search["edges"]) - 1
    sides = list(dict.fromkeys(c["side"] for c in search["candidates"]))
    found = {side: np.zeros((len(rows), num_segments), dtype=int) for side in sides}
    for group, segment, weight, activation in search["bits"]:
        for side, bits in (("weight", weight), ("activation", activation)):
            if side in found:
                found[side][rows[group], num_segments - 1 - segment] = bits
    return found


def segment_labels(edges: Sequence[float]) -> list[str]:
    """`1-0.75` for each segment, noise level falling."""
    return [f"{high:.3g}–{low:.3g}" for low, high in reversed([*pairwise(edges)])]


def heat_map_picture(search: Mapping[str, Any], path: Path) -> Path:
    """Write a PNG: one panel per side and bit-width, and one per side with the bits of the found plan.

    search: the content of search.json. Costs are drawn on one logarithmic scale; a dot marks those measured, the
    others are predicted from proxies.
    """
    costs, bits = panels(search), chosen_bits(search)
    marks = {(c["side"], c["bits"], c["group"], c["segment"]) for c in search["candidates"] if c["measured"]}
    names = [group["name"].replace("_", " ") for group in search["groups"]]
    columns = segment_labels(search["edges"])
    count = len(costs) + len(bits)
    height = min(0.24 * len(names), 16) + 1.6
    figure = Figure(figsize=(3.2 + count * (0.42 * len(columns) + 0.5), height), layout="constrained", dpi=110)
    axes = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    positive = np.concatenate([panel[panel > 0] for panel in costs.values()]) if costs else np.array([])
    norm = LogNorm(positive.min(), positive.max()) if len(positive) and positive.min() < positive.max() else None
    image = None
    for axis, ((side, width), panel) in zip(axes, costs.items(), strict=False):
        image = axis.imshow(np.where(panel > 0, panel, np.nan), aspect="auto", cmap="viridis", norm=norm)
        axis.set_title(f"{side}s at {width} bits", fontsize=9)
        for row, group in enumerate(search["groups"]):
            for segment in range(len(columns)):
                if (side, width, group["name"], segment) in marks:
                    axis.plot(len(columns) - 1 - segment, row, ".", color="white", markersize=2)
    for axis, (side, panel) in zip(axes[len(costs) :], bits.items(), strict=True):
        axis.imshow(panel, aspect="auto", cmap="Blues", vmin=0, vmax=24)
        axis.set_title(f"plan, {side}s", fontsize=9)
        for (row, column), value in np.ndenumerate(panel):
            if value:  # a part that never runs there has none
                axis.text(column, row, str(value), ha="center", va="center", fontsize=6)
    step = -(-len(names) // MAX_LABELS)
    axes[0].set_yticks(range(0, len(names), step), names[::step], fontsize=7)
    for axis in axes:
        axis.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
        axis.set_xlabel("noise level", fontsize=8)
    if image is not None:
        bar = figure.colorbar(image, ax=list(axes), shrink=0.6, pad=0.01)
        bar.set_label("mean square error of the output" if in_decibels(search) else "proxy of the error (no unit)")
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")
    return path
