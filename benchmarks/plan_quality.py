"""Searched plans beside uniform ones: a table with errors over seeds, paired differences, and a picture.

    python run.py -m experiment=w4a8_mp_search seed=0,1,2 quant.policy.budget.weight_bits=4.25,4.5,5,6,7 SMALL
    python run.py -m experiment=w4a8 seed=0,1,2 quant.weight.bits=4,5,6,7,8 SMALL
    python benchmarks/plan_quality.py 'outputs/tiny_video/*' --out docs/budget_curve.png

SMALL: data.num_prompts=32 noise_floor.num_prompts=0 diagnosis.num_prompts=0 logger=csv. Runs of one model are needed. A
difference is searched minus uniform at equal bits, prompt by prompt over all seeds that both have, with its error.
"""

import argparse
import glob
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from viditq.files import atomic, read_json
from viditq.report.budget_curve import decibels

Key = tuple[str, float, float]
"""uniform, searched or another word for how, then average bits of weights and of activations."""
Run = dict[str, Any]


def key_of(config: Run, found: Run | None, metrics: Run) -> Key:
    """What a run is, from its json files; the bits of a plan file are averages with the Linears kept in float."""
    quant, policy = config["quant"], config["quant"]["policy"]
    if found is None and "path" in policy:
        return "plan file", round(metrics["average_weight_bits"], 2), round(metrics["average_activation_bits"], 2)
    if found is None:
        return "uniform", quant["weight"]["bits"], quant["activation"]["bits"]
    how = "searched" if policy["objective"] == "output" else policy["objective"]
    if policy["average"] != "geometric":
        how += f", {policy['average']}"
    given = {name: limit for name, limit in found["budget"].items() if limit is not None}
    how += ", bytes" * ("size_bytes" in given) + ", latency" * ("latency" in given)
    bits = (given.get(name) or found["used"][name] for name in ("weight_bits", "activation_bits"))
    return how, *(round(float(value), 2) for value in bits)  # type: ignore[return-value]


def read(patterns: list[str]) -> dict[Key, dict[int, Run]]:
    """Key -> seed -> metrics, scores per prompt, and what was searched, of finished runs."""
    runs: dict[Key, dict[int, Run]] = defaultdict(dict)
    for folder in sorted({Path(name) for pattern in patterns for name in glob.glob(pattern)}):
        if (folder / "metrics.json").is_file():
            search = read_json(folder / "search.json") if (folder / "search.json").is_file() else None
            config = read_json(folder / "run.json")
            run = {"metrics": read_json(folder / "metrics.json"), "search": search}
            run["scores"] = read_json(folder / "per_prompt.json")["metrics"]
            runs[key_of(config, search, run["metrics"])][config["seed"]] = run
    return runs


def over_seeds(runs: dict[int, Run], metric: str) -> tuple[float, float]:
    """Mean and standard error over seeds of a metric's value (0 for a single seed)."""
    values = [run["metrics"]["metrics"][metric] for run in runs.values()]
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def difference(first: dict[int, Run], second: dict[int, Run], metric: str) -> tuple[float, float, int] | None:
    """first - second by prompt: mean, its standard error, how many pairs."""
    seeds = sorted(first.keys() & second.keys())
    if not seeds or any(metric not in run["scores"] for runs in (first, second) for run in runs.values()):
        return None
    pairs = [(first[s]["scores"][metric], second[s]["scores"][metric]) for s in seeds]
    delta = np.concatenate([np.subtract(a, b) for a, b in pairs])
    return float(delta.mean()), float(delta.std(ddof=1) / len(delta) ** 0.5), len(delta)


def table(runs: dict[Key, dict[int, Run]], metrics: list[str]) -> str:
    """Markdown: one row per kind of run."""
    lines = [
        f"| plan | W | A | seeds | MB | {' | '.join(metrics)} | PSNR minus uniform's |",
        "|---" * (6 + len(metrics)) + "|",
    ]
    for key in sorted(runs, key=lambda k: (k[2], k[1], k[0])):
        how, weight, activation = key
        megabytes = f"{np.mean([run['metrics']['size_bytes'] / 1e6 for run in runs[key].values()]):.2f}"
        values = [over_seeds(runs[key], metric) for metric in metrics]
        cells = [megabytes, *(f"{mean:.4g} ± {error:.2g}" if error else f"{mean:.4g}" for mean, error in values)]
        rival = runs.get(("uniform", weight, activation)) if how != "uniform" else None
        gain = difference(runs[key], rival, "psnr") if rival else None
        last = f"{gain[0]:+.2f} ± {gain[1]:.2f} ({gain[2]} pairs)" if gain else ""
        start = f"| {how} | {weight:.3g} | {activation:.3g} | {len(runs[key])}"
        lines.append(" | ".join([start, *cells, f"{last} |"]))
    return "\n".join(lines)


def picture(runs: dict[Key, dict[int, Run]], path: Path) -> None:
    """PSNR against average weight bits, activations at 8: uniform, searched, and what the searches predicted."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained", dpi=110)
    axis = figure.subplots()
    for how in ("uniform", "searched"):
        keys = sorted(key for key in runs if key[0] == how and key[2] == 8)
        quality = [over_seeds(runs[key], "psnr") for key in keys]
        means, errors = [mean for mean, _ in quality], [error for _, error in quality]
        axis.errorbar([key[1] for key in keys], means, errors, fmt="o-", capsize=3, label=how)
    ladders = [
        run["search"]["predicted_curve"]
        for k, of in runs.items()
        if k[0] == "searched" and k[1:] == (5.0, 8.0)
        for run in of.values()
    ]
    if ladders:
        bits = [point["weight_bits"] for point in ladders[0]]
        means = np.mean([[decibels(point["predicted"]) for point in ladder] for ladder in ladders], axis=0).tolist()
        axis.plot(bits, means, "--", color="C1", alpha=0.7, label="searched, predicted")
    axis.set_xlabel("average bits of the quantized weights")
    axis.set_ylabel("PSNR against float, dB")
    axis.grid(alpha=0.3)
    axis.legend()
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders of runs, or patterns in quotes")
    parser.add_argument("--metrics", nargs="+", default=["psnr", "clipsim"])
    parser.add_argument("--out", type=Path, help="the picture (PNG)")
    args = parser.parse_args()
    runs = read(args.runs)
    print(table(runs, args.metrics))
    if args.out:
        picture(runs, args.out)


if __name__ == "__main__":
    main()
