"""The charts of incoherence.json as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from viditq.files import atomic
from viditq.report.canvas import GREY, INK
from viditq.report.incoherence import SIDES, VARIANTS, by_role, log_axis, source_words
from viditq.report.wording import three_digits

COLORS = {"raw": INK, "scaled": "#bd5f22", "rotated": "#2b5cc4", "both": "#1b7a5e"}  # those of the page, by day


def incoherence_picture(found: Mapping[str, Any], path: Path, title: str) -> Path:
    """Write a PNG: activations above weights, four dots for each layer, the layers of a role side by side.

    found: the content of incoherence.json. The axis of the values is logarithmic; layers without values stay empty.
    """
    groups = by_role(found["layers"])
    count = len(found["layers"]) + len(groups)
    figure = Figure(figsize=(min(max(0.09 * count, 9), 22), 7.2), layout="constrained", dpi=110)
    axes = figure.subplots(2, 1)
    for axis, (side, name) in zip(axes, SIDES.items(), strict=True):
        _draw(axis, groups, side)
        axis.set_title(name, fontsize=10, loc="left")
    axes[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(VARIANTS), frameon=False, fontsize=9)
    figure.suptitle(f"Incoherence, amax / mean |x|: {title}", fontsize=11)
    figure.supxlabel(f"Activations: {source_words(found)}", fontsize=8, color=GREY)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def _draw(axis: Any, groups: Mapping[str, Mapping[str, Any]], side: str) -> None:
    places: list[int] = []
    middles, rows, start = [], [], 0
    for members in groups.values():
        places += range(start, start + len(members))
        middles.append(start + (len(members) - 1) / 2)
        start += len(members) + 1  # one place is left empty between roles
        for layer in members.values():
            rows.append([layer[side][v] or np.nan if layer[side] else np.nan for v in VARIANTS])
    xs, values = np.array(places), np.array(rows)  # [layers], [layers, variants]
    axis.set_yscale("log")
    seen = np.isfinite(values).any(1)
    if seen.any():
        bottom, top, ticks = log_axis(float(np.nanmin(values)), float(np.nanmax(values)))
        ends = np.nanmin(values[seen], 1), np.nanmax(values[seen], 1)
        axis.vlines(xs[seen], *ends, color=GREY, linewidth=0.8, alpha=0.35)
        axis.set_ylim(bottom, top)
        axis.yaxis.set_major_locator(FixedLocator(ticks))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_yticks(ticks, [three_digits(tick) for tick in ticks], fontsize=8)
    for variant, column in zip(VARIANTS, values.T, strict=True):
        axis.plot(xs, column, "o", color=COLORS[variant], markersize=3, label=variant)
    axis.set_xlim(-1, max(start - 1, 1))
    axis.set_xticks(middles, [role.replace(" ", "\n") for role in groups], fontsize=8)
    axis.tick_params(axis="x", length=0)
    axis.grid(axis="y", linewidth=0.4, alpha=0.5)
    axis.spines[["top", "right"]].set_visible(False)
