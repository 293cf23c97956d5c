"""What a search of treatments chose for each part, and quality against bytes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from viditq.files import atomic
from viditq.report.budget_curve import decibels
from viditq.report.pareto import FRONT, GREY, INK


def treatments_picture(result: Mapping[str, Any], path: Path) -> Path:
    """Write a PNG of treatments.json."""
    chosen = next(one for one in result["finalists"] if one["how"] == result["chosen"])
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(13, 1.6 + 0.24 * max(len(chosen["parts"]), 12)), layout="constrained")
        FigureCanvasAgg(figure)
        parts, curve = figure.subplots(1, 2, width_ratios=[1.4, 1])
        _draw_parts(parts, result, chosen)
        _draw_curve(curve, result, chosen)
        with atomic(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    return path


def _draw_parts(axis: Axes, result: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
    """A bar for each part: the error of the denoiser's output under its anchor, and in words what was chosen."""
    names, found = [*chosen["parts"]], result["found"]
    errors = [max(found[name]["output"], 1e-12) for name in names]
    axis.barh(range(len(names)), errors, left=min(errors) / 3, color=FRONT, alpha=0.35)
    axis.set_xscale("log")
    for place, name in enumerate(names):
        axis.text(min(errors) / 2.6, place, chosen["parts"][name].replace("_", " "), va="center", color=INK)
    axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axis.invert_yaxis()
    axis.set_xlabel("error that it alone makes in the denoiser's output, at about 4 bits (relative, squared)")
    axis.set_title("each part, and its treatment", color=INK)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_curve(axis: Axes, result: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
    """The predicted curve, moved so that it goes through the plan that was chosen, and all finalists as measured."""
    factor = chosen["measured"] / chosen["predicted"] if chosen["predicted"] else 1.0
    points = [(one["size"] / 1e6, decibels(factor * one["predicted"])) for one in result["curve"]]
    axis.plot(*zip(*points, strict=True), color=GREY, marker=".", label="predicted, through the plan")
    for one in result["finalists"]:
        colour = FRONT if one is chosen else INK
        axis.plot(one["size"] / 1e6, decibels(one["measured"]), "o", color=colour, label=f"measured, {one['how']}")
    axis.set_xlabel("artifact, MB")
    axis.set_ylabel(f"PSNR of {result['prompts']} held-out prompts, dB")
    axis.set_title("quality for the bytes", color=INK)
    axis.legend(frameon=False, loc="lower right")
    axis.grid(color="#e8eaed", lw=0.7)
    axis.spines[["top", "right"]].set_visible(False)
