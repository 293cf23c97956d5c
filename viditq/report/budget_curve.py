"""Quality against bits for the plans of one search: predicted by the summed sensitivities, and measured."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from viditq.files import atomic


def decibels(squared_error: float) -> float:
    """PSNR of a mean square error of pixels in [0, 1]; capped at 100."""
    return 100.0 if squared_error <= 1e-10 else -10 * math.log10(squared_error)


def curve_table(curve: Sequence[Mapping[str, Any]]) -> str:
    """The points as a markdown table."""
    lines = ["| weight bits | activation bits | bytes | predicted dB | measured dB |", "|---|---|---|---|---|"]
    for p in sorted(curve, key=lambda p: (p["weight_bits"], p["activation_bits"])):
        quality = f"{decibels(p['predicted']):.2f} | {decibels(p['measured']):.2f}"
        bits = f"{p['weight_bits']:.2f} | {p['activation_bits']:.2f}"
        lines.append(f"| {bits} | {p['size_bytes']:.0f} | {quality} |")
    return "\n".join(lines) + "\n"


def budget_curve_picture(curve: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write a PNG of the points, by the mean of weight and activation bits."""
    figure = Figure(figsize=(5.2, 3.6), layout="constrained", dpi=110)
    axis = figure.subplots()
    varies = {side: len({round(p[f"{side}_bits"], 6) for p in curve}) > 1 for side in ("weight", "activation")}
    sides = [side for side, moves in varies.items() if moves] or ["weight"]
    points = sorted((sum(p[f"{s}_bits"] for s in sides) / len(sides), p) for p in curve)  # type: ignore[misc]
    x = [bits for bits, _ in points]
    axis.plot(x, [decibels(p["measured"]) for _, p in points], "o-", label="measured")
    axis.plot(x, [decibels(p["predicted"]) for _, p in points], "s--", label="predicted")
    axis.set_xlabel(f"average bits of {' and '.join(f'{side}s' for side in sides)}")
    axis.set_ylabel("PSNR of the mean square error, dB")
    axis.grid(alpha=0.3)
    axis.legend()
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")
    return path
