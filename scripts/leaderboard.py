"""Gather finished runs into a leaderboard: a table as html, markdown and csv, and Pareto plots for each model.

    python run.py -m experiment=w8a8,w4a8,... model=tiny_image,tiny_video seed=0,1,2
    python scripts/leaderboard.py outputs/tiny_image/* outputs/tiny_video/* --out outputs/leaderboard

Runs that differ only in the seed make one row: mean and standard error over seeds, or one seed's 95 % interval. The
markdown table is printed too. Folders that hold no finished run are left out and named.
"""

import argparse
import base64
import glob
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from viditq.errors import UserError
from viditq.files import atomic, read_json
from viditq.report.leaderboard import Board, Row, comma_separated, heading, make_board, markdown, page
from viditq.report.pareto import Panel, Point, pareto_picture
from viditq.run_dir import flatten

Runs = dict[Path, tuple[dict[str, Any], dict[str, Any]]]
COSTS = {"weight bits": "weight_bits", "denoiser, MB": "megabytes", "sampling, s": "seconds"}
NOT_NAMED = {"seed", "name"}  # keys of a configuration that never tell rows apart


def find(arguments: list[str]) -> list[Path]:
    """Folders given by name or by pattern, each once. Raises UserError for one that does not exist."""
    found: dict[Path, None] = {}
    for argument in arguments:
        names = [argument] if Path(argument).exists() else sorted(glob.glob(argument))
        if not names:
            raise UserError(f"{argument} does not exist. Give folders of runs, or a pattern in quotes: 'outputs/*/*'.")
        found |= {Path(os.path.normpath(name)): None for name in names if Path(name).is_dir()}
    return list(found)


def read(folders: list[Path]) -> Runs:
    """metrics.json and the configuration of every finished run; names the others on stderr."""
    runs: Runs = {}
    for folder in folders:
        absent = [name for name in ("run.json", "metrics.json") if not (folder / name).is_file()]
        if absent:
            print(f"left out: {folder} has no {' and no '.join(absent)}", file=sys.stderr)
        else:
            runs[folder] = read_json(folder / "metrics.json"), flatten(read_json(folder / "run.json"))
    if not runs:
        raise UserError("None of these folders holds a finished run (run.json and metrics.json).")
    return runs


def rows(runs: Runs, beside: Path) -> dict[str, list[Row]]:
    """Model -> rows, each a configuration with its seeds; a run that repeats a seed is left out and named."""
    groups: dict[tuple[str, str], dict[int, Path]] = defaultdict(dict)
    for folder, (metrics, config) in runs.items():
        key = repr(sorted((k, repr(v)) for k, v in config.items() if k != "seed" and not k.startswith("inputs.")))
        seeds = groups[metrics["model"], key]
        if metrics["seed"] in seeds:
            print(f"left out: {folder} repeats {seeds[metrics['seed']]}", file=sys.stderr)
        seeds.setdefault(metrics["seed"], folder)
    found: dict[str, list[Row]] = defaultdict(list)
    for (model, _), seeds in groups.items():
        first = seeds[min(seeds)]
        rivals = [g[min(g)] for (other, _), g in groups.items() if other == model]
        same = [f for f in rivals if runs[f][0]["experiment"] == runs[first][0]["experiment"]]
        name = runs[first][0]["experiment"] + difference(runs[first][1], [runs[f][1] for f in same])
        report = first / "report.html"
        link = quote(Path(os.path.relpath(report, beside)).as_posix()) if report.is_file() else ""
        found[model].append(Row(name, [runs[seeds[seed]][0] for seed in sorted(seeds)], link))
    return dict(sorted(found.items()))


def difference(config: dict[str, Any], rivals: list[dict[str, Any]]) -> str:
    """What tells a configuration from others of its name: ` quant.weight.bits=4`; empty if it has the name alone."""
    keys = sorted({k for rival in rivals for k in {*rival, *config} if rival.get(k) != config.get(k)} - NOT_NAMED)
    named = [k for k in keys if not k.startswith("inputs.")] or keys
    return "".join(f" {key}={config.get(key)}" for key in named)


def plot(board: Board, path: Path) -> list[Path]:
    """Pareto plots of a model's first metric against bits, bytes and seconds."""
    panels = []
    for cost, attribute in COSTS.items():
        scored = [(row, row.score(board.first)) for row in board.rows]
        points = [Point(r.name, getattr(r, attribute), s.value, *s.bounds) for r, s in scored if s is not None]
        panels.append(Panel(cost, [point for point in points if point.cost == point.cost]))
    label = board.metrics[board.first]
    title = f"{board.model}: {label['label']} against cost"
    return pareto_picture(panels, heading(label), bool(label["higher_is_better"]), title, path)


def chosen(metric: str | None, model: str, found: list[Row]) -> str | None:
    """The metric to rank a model by; None, and a line on stderr, where its runs did not measure the one asked for."""
    if metric is None or any(metric in row.metrics[0]["metrics"] for row in found):
        return metric
    print(f"{model} was not measured by {metric}: ranked by its first metric", file=sys.stderr)
    return None


def write(path: Path, text: str) -> Path:
    """A text file, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text)
    return path


def leaderboard(arguments: list[str], out: Path, metric: str | None) -> None:
    """Write <out>.html, .md, .csv and <out>_<model>.png, .svg; print the table."""
    models = rows(read(find(arguments)), out.parent)
    measured = sorted({name for found in models.values() for row in found for name in row.metrics[0]["metrics"]})
    if metric is not None and metric not in measured:
        raise UserError(f"--metric {metric} was not measured. Choose one of {', '.join(measured)}.")
    boards = [make_board(model, found, chosen(metric, model, found)) for model, found in models.items()]
    files, pictures = [], {}
    for board in boards:
        png, svg = plot(board, out.with_name(f"{out.name}_{board.model}"))
        pictures[board.model] = "data:image/svg+xml;base64," + base64.b64encode(svg.read_bytes()).decode()
        files += [png, svg]
    table = markdown(boards)
    files += [write(Path(f"{out}.md"), table), write(Path(f"{out}.csv"), comma_separated(boards))]
    files += [write(Path(f"{out}.html"), page(boards, pictures))]
    print(table)
    print("\n".join(f"written: {file}" for file in reversed(files)), file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or a pattern in quotes")
    parser.add_argument("--out", type=Path, default=Path("outputs/leaderboard"), help="files begin with this")
    parser.add_argument("--metric", help="sorts the rows and is plotted (default: the first of the runs' metrics)")
    args = parser.parse_args()
    try:
        leaderboard(args.runs, args.out, args.metric)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
