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


def curve_table(curve: Points) -> str:
    """The points as a markdown table."""
    lines = ["| weight bits | activation bits | bytes | predicted dB | measured dB |", "|---|---|---|---|---|"]
    for p in sorted(curve, key=lambda p: (p["weight_bits"], p["activation_bits"])):
        quality = f"{decibels(p['predicted']):.2f} | {decibels(p['measured']):.2f}"
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
    """Write a PNG: what search.json predicts from the leanest choices to the widest, its plan, and what is measured."""
    figure = Figure(figsize=(5.2, 3.6), layout="constrained", dpi=110)
    axis = figure.subplots()
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
            axis.plot(*zip(*drawn, strict=True), style, label=label or None, markersize=size, color=color)
    axis.set_xlabel(axis_label(search))
    axis.set_ylabel("PSNR of the mean square error, dB")
    axis.grid(alpha=0.3)
    axis.legend()
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")
    return path
