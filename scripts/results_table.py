"""Gather finished runs into one table per model: mean and standard error over seeds.

# the ladder (resumes; only what is missing is done)
python run.py -m experiment=w8a8,w4a8,... model=tiny_image,tiny_video seed=0,1,2
python scripts/results_table.py outputs/tiny_image/* outputs/tiny_video/* > table.md
"""

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

Metrics = dict[str, Any]


def read_runs(folders: list[Path]) -> dict[str, dict[str, list[Metrics]]]:
    """Model -> experiment -> metrics.json of each seed."""
    runs: dict[str, dict[str, dict[int, Metrics]]] = defaultdict(lambda: defaultdict(dict))
    for folder in folders:
        if (folder / "metrics.json").is_file():
            metrics = json.loads((folder / "metrics.json").read_text())
            runs[metrics["model"]][metrics["experiment"]][metrics["seed"]] = metrics
    return {model: {e: list(seeds.values()) for e, seeds in group.items()} for model, group in runs.items()}


def mean_and_error(values: list[float]) -> str:
    """`38.02 ± 0.31`, the error being the standard error over seeds."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.4g}"
    error = statistics.stdev(values) / math.sqrt(len(values))
    digits = 2 if error == 0 else min(max(1 - math.floor(math.log10(error)), 0), 5)
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def values(runs: list[Metrics], name: str) -> list[float]:
    """A metric of all seeds; empty if one of them did not measure it."""
    found = [run["metrics"].get(name) for run in runs]
    return [] if None in found else found


def table(experiments: dict[str, list[Metrics]]) -> str:
    """One markdown table, best first by the first metric."""
    first = max((runs[0] for runs in experiments.values()), key=lambda run: len(run["metrics"]))
    names = list(first["metrics"])
    labels = [f"{first['labels'][n]['label']} {first['labels'][n]['unit']}".strip() for n in names]
    sign = -1 if first["labels"][names[0]]["higher_is_better"] else 1
    lines = ["| experiment | seeds | W bits | A bits | MB | " + " | ".join(labels) + " | seconds |"]
    lines.append("|---" * (6 + len(names)) + "|")
    order = sorted(
        experiments, key=lambda e: statistics.fmean([sign * v for v in values(experiments[e], names[0])] or [math.inf])
    )
    for experiment in order:
        runs = experiments[experiment]
        bits = f"{runs[0]['average_weight_bits']:.2f} | {runs[0]['average_activation_bits']:.2f}"
        size = f"{runs[0]['size_bytes'] / 1e6:.2f}"
        measured = [values(runs, name) for name in names]
        cells = [mean_and_error(found) if found else "-" for found in measured]
        seconds = statistics.median(r["seconds"].get("generate", math.nan) for r in runs)
        lines.append(f"| {experiment} | {len(runs)} | {bits} | {size} | " + " | ".join(cells) + f" | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs; those without metrics.json are left out")
    models = read_runs(parser.parse_args().runs)
    if not models:
        sys.exit("error: none of these folders holds a metrics.json. Give folders of finished runs.")
    for model, experiments in sorted(models.items()):
        example = next(iter(experiments.values()))[0]
        print(f"### {model} ({example['prompts']} pairs a seed)\n")
        print(table(experiments) + "\n")
        floats = {
            example["labels"][name]["label"]: mean_and_error([r["float_metrics"][name] for r in runs])
            for runs in [next(iter(experiments.values()))]
            for name in example["float_metrics"]
        }
        print("Float model: " + ", ".join(f"{label} {value}" for label, value in floats.items()) + ".\n")


if __name__ == "__main__":
    main()
