"""Gather finished runs into a leaderboard: a table as html, markdown and csv, and Pareto plots for each model.

    python run.py -m experiment=w8a8,w4a8,... model=tiny_image,tiny_video seed=0,1,2
    python scripts/leaderboard.py outputs/tiny_image/* outputs/tiny_video/* --out outputs/leaderboard

Runs that differ only in the seed make one row: mean and standard error over seeds, or one seed's 95 % interval; each
is compared with the row above over the same prompts and noise. With --widths every pair of bit widths has a table of
its own, and one more table and a picture show methods beside widths. The markdown is printed too. Folders that hold no
finished run are left out and named.
"""

import argparse
import base64
import glob
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from viditq.errors import UserError
from viditq.files import atomic, read_json
from viditq.metrics.bootstrap import bootstrap_interval
from viditq.report.leaderboard import Board, comma_separated, heading, make_board, markdown, page
from viditq.report.pareto import Panel, Point, pareto_picture
from viditq.report.row import Row
from viditq.report.widths import methods_table, widths_picture
from viditq.run_dir import flatten

Runs = dict[Path, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]
WIDTHS = ("quant.weight.bits", "quant.activation.bits")
COSTS = {  # name -> axis, attribute of a row
    "bits": ("weight bits", "weight_bits"),
    "bytes": ("denoiser, MB", "megabytes"),
    "seconds": ("sampling, s", "seconds"),
}
PARETO_ALT = "Quality of {} against {}, with the Pareto front"
WIDTHS_ALT = "Quality of each method on {} at each pair of bit widths, with error bars"
BOLD = "Bold: the best of its width, and all whose paired 95 % interval to it includes 0."
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
    """metrics.json, configuration and per_prompt.json of every finished run; names the others on stderr."""
    runs: Runs = {}
    for folder in folders:
        absent = [name for name in ("run.json", "metrics.json") if not (folder / name).is_file()]
        if absent:
            print(f"left out: {folder} has no {' and no '.join(absent)}", file=sys.stderr)
        else:
            values = folder / "per_prompt.json"
            try:
                per_prompt = read_json(values) if values.is_file() else {"prompts": [], "metrics": {}}
                runs[folder] = read_json(folder / "metrics.json"), flatten(read_json(folder / "run.json")), per_prompt
            except UserError as error:
                print(f"left out: {error}", file=sys.stderr)
    if not runs:
        raise UserError("None of these folders holds a finished run (run.json and metrics.json).")
    return runs


def configuration(run: dict[str, Any]) -> str:
    """What a run shares with those of other seeds."""
    return repr(sorted((k, repr(v)) for k, v in run.items() if k != "seed"))


def unrepeated(runs: Runs) -> Runs:
    """Without runs that repeat a seed of a configuration, which are named."""
    found: Runs = {}
    seen: dict[tuple[str, int], Path] = {}
    for folder, run in runs.items():
        first = seen.setdefault((configuration(run[1]), run[0]["seed"]), folder)
        if first == folder:
            found[folder] = run
        else:
            print(f"left out: {folder} repeats {first}", file=sys.stderr)
    return found


def rows(runs: Runs, beside: Path) -> list[Row]:
    """Each a configuration with its seeds."""
    groups: dict[str, dict[int, Path]] = defaultdict(dict)
    for folder, (metrics, config, _) in runs.items():
        groups[configuration(config)][metrics["seed"]] = folder
    found, firsts = [], [seeds[min(seeds)] for seeds in groups.values()]
    for seeds in groups.values():
        ordered = [runs[seeds[seed]] for seed in sorted(seeds)]
        first, (metrics, config, _) = seeds[min(seeds)], ordered[0]
        name = metrics["experiment"]
        name += difference(config, [runs[f][1] for f in firsts if runs[f][0]["experiment"] == name])
        report = first / "report.html"
        link = quote(Path(os.path.relpath(report, beside)).as_posix()) if report.is_file() else ""
        found.append(Row(name, [m for m, _, _ in ordered], link, [values for _, _, values in ordered]))
    return found


def difference(config: dict[str, Any], rivals: list[dict[str, Any]]) -> str:
    """What tells a configuration from others of its name: ` W4A8 seed=1`; empty if it has the name alone."""
    keys = sorted({k for rival in rivals for k in {*rival, *config} if rival.get(k) != config.get(k)} - NOT_NAMED)
    named = [k for k in keys if not k.startswith("inputs.")] or keys
    if width_of(config) and not {*WIDTHS}.isdisjoint(named):
        return f" {width_of(config)}" + "".join(f" {key}={config.get(key)}" for key in named if key not in WIDTHS)
    return "".join(f" {key}={config.get(key)}" for key in named)


def width_of(config: dict[str, Any]) -> str:
    """`W4A8`; empty unless both are quantized, and where a plan gives each part bits of its own."""
    if str(config.get("quant.policy._target_", "")).endswith((".PlanFile", ".SensitivitySearch")):
        return ""
    weight, activation = (config.get(key) for key in WIDTHS)
    return f"W{weight}A{activation}" if weight and activation else ""


def grouped(runs: Runs, by_width: bool) -> dict[tuple[str, str], Runs]:
    """(model, width) -> its runs, least bits first; the width is empty unless asked for."""
    found: dict[tuple[str, str], Runs] = defaultdict(dict)
    for folder, run in runs.items():
        found[run[0]["model"], width_of(run[1]) if by_width else ""][folder] = run
    return dict(sorted(found.items()))


def plot(board: Board, path: Path, costs: Sequence[str]) -> list[Path]:
    """Pareto plots of a model's first metric against some of COSTS."""
    panels = []
    for cost, attribute in (COSTS[name] for name in costs):
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


def interval_of(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of a mean over prompts."""
    return bootstrap_interval(torch.tensor(values, dtype=torch.float64))


def make_boards(runs: Runs, beside: Path, metric: str | None, by_width: bool) -> list[Board]:
    """One for each model, or for each model and width."""
    found = {key: rows(part, beside) for key, part in grouped(runs, by_width).items()}
    measured = sorted({name for part in found.values() for row in part for name in row.metrics[0]["metrics"]})
    if metric is not None and metric not in measured:
        raise UserError(f"--metric {metric} was not measured. Choose one of {', '.join(measured)}.")
    return [
        make_board(model, part, chosen(metric, model, part), interval_of, width)
        for (model, width), part in found.items()
    ]


def leaderboard(arguments: list[str], out: Path, metric: str | None, by_width: bool, costs: Sequence[str]) -> None:
    """Write <out>.html, .md, .csv and the pictures of each model as .png and .svg; print the tables."""
    runs = unrepeated(read(find(arguments)))
    boards = make_boards(runs, out.parent, metric, by_width)
    files: list[Path] = []
    pictures: dict[str, list[tuple[str, str]]] = {}
    summary = []
    for model in dict.fromkeys(board.model for board in boards):
        mine = [board for board in boards if board.model == model]
        whole = make_boards({f: run for f, run in runs.items() if run[0]["model"] == model}, out.parent, metric, False)
        alt = PARETO_ALT.format(model, ", ".join(COSTS[cost][0] for cost in costs))
        drawn = [(alt, plot(whole[0], out.with_name(f"{out.name}_{model}"), costs))]
        if by_width:
            drawn.append((WIDTHS_ALT.format(model), widths_picture(mine, out.with_name(f"{out.name}_{model}_widths"))))
            label = heading(mine[0].metrics[mine[0].first])
            summary.append(f"### {model}: {label} of each method at each width\n\n{methods_table(mine)}\n\n{BOLD}\n\n")
        files += [file for _, pair in drawn for file in pair]
        pictures[mine[0].title] = [(alt, data_uri(pair[1])) for alt, pair in reversed(drawn)]
    table = "".join(summary) + markdown(boards)
    files += [write(Path(f"{out}.md"), table), write(Path(f"{out}.csv"), comma_separated(boards))]
    files += [write(Path(f"{out}.html"), page(boards, pictures))]
    print(table)
    print("\n".join(f"written: {file}" for file in reversed(files)), file=sys.stderr)


def data_uri(svg: Path) -> str:
    """A picture for a page that needs no other file."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.read_bytes()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or a pattern in quotes")
    parser.add_argument("--out", type=Path, default=Path("outputs/leaderboard"), help="files begin with this")
    parser.add_argument("--metric", help="sorts the rows and is plotted (default: the first of the runs' metrics)")
    parser.add_argument("--widths", action="store_true", help="compare methods at equal bit widths")
    parser.add_argument("--costs", nargs="+", choices=COSTS, default=[*COSTS], help="what quality is plotted against")
    args = parser.parse_args()
    try:
        leaderboard(args.runs, args.out, args.metric, args.widths, args.costs)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
