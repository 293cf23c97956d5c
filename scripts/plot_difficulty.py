"""Measure and plot what makes a model hard to quantize.

    python scripts/plot_difficulty.py model=tiny_video            # any model and override that run.py takes
    python scripts/plot_difficulty.py model=tiny_image data.num_calibration_prompts=32

Calibrates once (the same cached statistics that experiments use) and writes, under outputs/difficulty/<model>/,
difficulty.png and difficulty.json: of each quantized Linear's input how far values stick out (incoherence, amax / mean
|x| of the kept rows), how far its channels differ (amax, largest / median), how its whole range and single channels
change over the noise levels, and its weight's kurtosis.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from hydra import compose, initialize_config_dir
from matplotlib.axes import Axes
from torch import Tensor, nn

from viditq import config
from viditq.cli import guarded_main
from viditq.experiment import build
from viditq.files import atomic, write_json
from viditq.job import Job
from viditq.quant.calibration.statistics import CalibrationStats
from viditq.quant.diagnosis.incoherence import incoherence_of
from viditq.run_dir import RunDir
from viditq.runner import quiet_libraries
from viditq.stages.calibrate import observe
from viditq.stages.prompts import prompts

KEYS = {
    "incoherence": "activations: amax / mean |x|",
    "channel_ratio": "activations over channels:\namax, largest / median",
    "noise_level_ratio": "activations over noise levels:\namax, largest / smallest",
    "channel_level_ratio": "the 8 largest channels over noise levels:\namax, largest / smallest, median",
    "kurtosis": "weights: excess kurtosis\n(0 = Gaussian)",
}
TOP_CHANNELS = 8  # those with the largest magnitudes, whose change over noise levels is told
CONF = Path(__file__).parents[1] / "conf"


def bucket_amax(stats: CalibrationStats, layer: str) -> tuple[Tensor, Tensor]:
    """Noise levels [K] of the buckets that were seen, and the largest |x| of every channel in them [K, C]."""
    observer = stats.layers[layer]
    seen = observer.count > 0
    middles = (torch.arange(len(seen)) + 0.5) / len(seen)
    return middles[seen], torch.maximum(-observer.minimum, observer.maximum)[seen]


def kurtosis(weight: Tensor) -> float:
    """Excess kurtosis: 0 for a Gaussian, -1.2 for a uniform, large for heavy tails."""
    x = weight.double().flatten()
    x = x - x.mean()
    return float((x**4).mean() / (x**2).mean() ** 2 - 3)


def channel_level_ratio(amax_KC: Tensor) -> float:
    """Of the TOP_CHANNELS channels with the largest |x|: amax, largest over smallest of the noise levels, median."""
    top_KT = amax_KC[:, amax_KC.amax(0).argsort(descending=True)[:TOP_CHANNELS]]
    return float((top_KT.amax(0) / top_KT.amin(0).clamp(min=1e-12)).median())


def measure(stats: CalibrationStats, denoiser: nn.Module, roles: dict[str, str]) -> list[dict[str, Any]]:
    """One row per quantized Linear: its layer, its role and KEYS."""
    rows = []
    modules = dict(denoiser.named_modules())
    for layer, role in roles.items():
        if role == "float":
            continue
        amax_KC = bucket_amax(stats, layer)[1]
        channels, levels = amax_KC.amax(0), amax_KC.amax(1)
        rows.append(
            {
                "layer": layer,
                "role": role,
                "incoherence": incoherence_of({"raw": lambda x: x}, stats.segment(layer, 0, 1).rows)["raw"],
                "channel_ratio": float(channels.max() / channels.median().clamp(min=1e-12)),
                "noise_level_ratio": float(levels.max() / levels.min().clamp(min=1e-12)),
                "channel_level_ratio": channel_level_ratio(amax_KC),
                "kurtosis": kurtosis(modules[layer].weight),
            }
        )
    return rows


def plot_heat(axes: Axes, stats: CalibrationStats, layer: str, role: str) -> None:
    """Channel magnitudes (sorted) over noise level, for one layer."""
    levels, amax_KC = bucket_amax(stats, layer)
    order = amax_KC.amax(0).argsort(descending=True)
    image = axes.pcolormesh(range(len(order)), levels, amax_KC[:, order].clamp(min=1e-6).log10(), shading="nearest")
    axes.set(title=f"{role}\n{layer}", xlabel="input channel, sorted", ylabel="noise level")
    axes.title.set_fontsize(8)
    axes.figure.colorbar(image, ax=axes, label="log10 amax")


def plot_rows(axes: Axes, rows: list[dict[str, Any]], key: str, title: str, logarithmic: bool) -> None:
    """One dot per layer, grouped by role."""
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        groups[row["role"]].append(row[key])
    for place, values in enumerate(groups.values()):
        spread = [place + 0.5 * ((i + 0.5) / len(values) - 0.5) for i in range(len(values))]
        axes.scatter(spread, values, s=14, alpha=0.8)
    axes.set_xticks(range(len(groups)), [role.replace("_", "\n") for role in groups], fontsize=8)
    axes.set_title(title, fontsize=9)
    if logarithmic:
        axes.set_yscale("log")
    axes.grid(axis="y", alpha=0.3)


def plot(stats: CalibrationStats, rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """The page: above, one heat map per role (its layer of largest channel ratio); below, all layers."""
    worst = {}
    for row in sorted(rows, key=lambda r: r["channel_ratio"]):
        worst[row["role"]] = row["layer"]
    figure = plt.figure(figsize=(4 * max(len(KEYS), len(worst)), 7.5), layout="constrained")
    halves: Any = figure.subfigures(2, 1)
    upper, lower = halves
    for axes, (role, layer) in zip(upper.subplots(1, len(worst), squeeze=False)[0], worst.items(), strict=True):
        plot_heat(axes, stats, layer, role)
    for axes, (key, text) in zip(lower.subplots(1, len(KEYS)), KEYS.items(), strict=True):
        plot_rows(axes, rows, key, text, logarithmic=key != "kurtosis")
    figure.suptitle(title)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def main(overrides: list[str]) -> None:
    quiet_libraries()
    config.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", ["name=difficulty", "logger=none", *overrides])
    experiment = build(cfg)
    folder = Path("outputs/difficulty") / experiment.adapter.name
    job = Job(experiment, RunDir(folder, experiment.tracked))
    prompts(job)
    observe(job)
    stats = CalibrationStats.load(job.stats_file)
    denoiser = experiment.adapter.denoiser_of(experiment.adapter.load())
    rows = measure(stats, denoiser, experiment.adapter.linear_roles(list(stats.layers)))
    write_json(folder / "difficulty.json", rows)
    plot(stats, rows, f"What makes {experiment.adapter.name} hard to quantize", folder / "difficulty.png")
    for key in KEYS:
        top = max(rows, key=lambda row: row[key])
        median = torch.tensor([row[key] for row in rows]).median()
        print(f"{key:19s} median {float(median):8.2f}   largest {top[key]:8.2f} ({top['layer']})")
    print(f"picture: {folder / 'difficulty.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as run.py takes them")
    overrides = parser.parse_args().overrides
    sys.exit(guarded_main(lambda: main(overrides)))
