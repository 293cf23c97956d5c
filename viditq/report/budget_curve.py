"""Quality against the budget for the plans of one search: predicted by the summed sensitivities, and measured."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from viditq.files import atomic

AXES = {"size_bytes": "weights, MB", "latency": "latency, float = 1"}
Points = Sequence[Mapping[str, Any]]


def decibels(squared_error: float) -> float:
    """PSNR of a mean square error of pixels in [0, 1]; capped at 100."""
    return 100.0 if squared_error <= 1e-10 else -10 * math.log10(squared_error)


def in_decibels(search: Mapping[str, Any]) -> bool:
    """Whether search.json predicts errors of pixels: sums of bare proxies have no unit."""
    return any(c["measured"] for c in search["candidates"])


def predicted_quality(search: Mapping[str, Any], error: float) -> str:
    """In words."""
    return f"{decibels(error):.1f} dB" if in_decibels(search) else f"{error:.2e} (sum of proxies, no unit)"


def curve_table(search: Mapping[str, Any], curve: Points) -> str:
    """Points of searches like this one as a markdown table."""
    told = "predicted dB" if in_decibels(search) else "sum of proxies"
    lines = [f"| weight bits | activation bits | bytes | {told} | measured dB |", "|---|---|---|---|---|"]
    for p in sorted(curve, key=lambda p: (p["weight_bits"], p["activation_bits"])):
        predicted = f"{decibels(p['predicted']):.2f}" if in_decibels(search) else f"{p['predicted']:.2e}"
        quality = f"{predicted} | {decibels(p['measured']):.2f}"
        bits = f"{p['weight_bits']:.2f} | {p['activation_bits']:.2f}"
        lines.append(f"| {bits} | {p['size_bytes']:.0f} | {quality} |")
    return "\n".join(lines) + "\n"


def spent(search: Mapping[str, Any], point: Mapping[str, Any]) -> float:
    """Where a point lies on the axis: average of the bits that search.json's budget limits, else bytes or latency."""
    limited = [name for name, limit in search["budget"].items() if limit is not None and name in search["used"]]
    bits = [name for name in limited if name.endswith("_bits")]
    if bits:
        return sum(point[name] for name in bits) / len(bits)
    return point["size_bytes"] / 1e6 if "size_bytes" in limited else point["latency"]


def axis_label(search: Mapping[str, Any]) -> str:
    """What `spent` tells."""
    limited = [name for name, limit in search["budget"].items() if limit is not None and name in search["used"]]
    sides = [f"{name.removesuffix('_bits')}s" for name in limited if name.endswith("_bits")]
    return f"average bits of {' and '.join(sides)}" if sides else AXES[limited[0]]


def budget_curve_picture(search: Mapping[str, Any], path: Path) -> Path:
    """Write a PNG: what search.json predicts from the leanest choices to the widest, its plan, and what is measured.

    Sums of bare proxies are drawn by a scale of their own, on the left.
    """
    figure = Figure(figsize=(5.2, 3.6), layout="constrained", dpi=110)
    axis = figure.subplots()
    comparable = in_decibels(search)
    right = axis.twinx() if search["curve"] and not comparable else axis
    for points, score, style, label in (
        (search["predicted_curve"], "predicted", "-", "predicted"),
        (search["curve"], "predicted", "s", ""),
        (search["curve"], "measured", "o--", "measured"),
        ([{**search["used"], "predicted": search["predicted"]}], "predicted", "*", "the plan"),
    ):
        drawn = sorted((spent(search, p), decibels(p[score])) for p in points)
        if drawn:
            size = 14 if label == "the plan" else 5
            color = {"s": "C0", "-": "C0", "*": "C3"}.get(style, "C1")
            on = right if score == "measured" else axis
            on.plot(*zip(*drawn, strict=True), style, label=label or None, markersize=size, color=color)
    axis.set_xlabel(axis_label(search))
    right.set_ylabel("PSNR of the mean square error, dB")
    if not comparable:
        axis.set_ylabel("−10 log10 of the summed proxies (no unit)")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")
    return path
