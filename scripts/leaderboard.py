"""Gather finished runs into a leaderboard: a table as html, markdown and csv, and Pareto plots for each model.

    python run.py -m experiment=w8a8,w4a8,... model=tiny_image,tiny_video seed=0,1,2
    python scripts/leaderboard.py outputs/tiny_image/* outputs/tiny_video/* --out outputs/leaderboard

Runs that differ only in the seed make one row: mean and standard error over seeds, or one seed's 95 % interval; each
is compared with the row above over the same prompts and noise. With --widths every pair of bit widths has a table of
its own, and one more table and a picture show methods beside widths. Rows with other seeds, prompts or float samples
than most have tables of their own, as they do not compare. The markdown is printed too. Folders that hold no finished
run are left out and named.
"""

import argparse
import base64
import glob
import math
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from viditq.errors import UserError
from viditq.files import atomic, read_mapping
from viditq.metrics.bootstrap import bootstrap_interval
from viditq.report.inputs import by_inputs, what_differs
from viditq.report.leaderboard import Board, comma_separated, heading, make_board, markdown, page
from viditq.report.pareto import Panel, Point, pareto_picture
from viditq.report.row import Row, directed, labels_of, ranking_metric
from viditq.report.widths import methods_table, widths_picture
from viditq.run_dir import flatten

FILES = {  # of a finished run, with the keys that have to be there
    "run.json": ("name", "seed"),
    "metrics.json": (
        *("model", "experiment", "seed", "prompts", "metrics", "labels", "float_metrics", "seconds"),
        *("average_weight_bits", "average_activation_bits", "size_bytes"),
    ),
    "per_prompt.json": ("prompts", "metrics", "reference"),
}
SPEED, SPEED_KEYS = "speed.json", ("backend", "batch_size", "rounds", "machine", "candidates")
Runs = dict[Path, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any] | None]]
WIDTHS = ("quant.weight.bits", "quant.activation.bits")
COSTS = {  # name -> axis, attribute of a row
    "bits": ("weight bits", "weight_bits"),
    "bytes": ("denoiser, MB", "megabytes"),
    "step": ("measured step, ms", "step_milliseconds"),
}
NOT_MEASURED = "no run has a step that was measured without emulation (the stage benchmark measures)"
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
    """metrics.json, configuration, per_prompt.json and speed.json (None without) of every finished run; names the
    others on stderr.
    """
    runs: Runs = {}
    for folder in folders:
        absent = [name for name in FILES if not (folder / name).is_file()]
        if absent:
            print(f"left out: {folder} has no {' and no '.join(absent)}", file=sys.stderr)
            continue
        try:
            config, metrics, per_prompt = (read_mapping(folder / name, keys) for name, keys in FILES.items())
            speed = read_mapping(folder / SPEED, SPEED_KEYS) if (folder / SPEED).is_file() else None
            runs[folder] = metrics, flatten(config), per_prompt, speed
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not runs:
        raise UserError(f"None of these folders holds a finished run ({', '.join(FILES)}).")
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
    for folder, (metrics, config, _, _) in runs.items():
        groups[configuration(config)][metrics["seed"]] = folder
    found, firsts = [], [seeds[min(seeds)] for seeds in groups.values()]
    for seeds in groups.values():
        ordered = [runs[seeds[seed]] for seed in sorted(seeds)]
        first, (metrics, config, _, _) = seeds[min(seeds)], ordered[0]
        name = metrics["experiment"]
        name += difference(config, [runs[f][1] for f in firsts if runs[f][0]["experiment"] == name])
        report = first / "report.html"
        link = quote(Path(os.path.relpath(report, beside)).as_posix()) if report.is_file() else ""
        all_metrics, _, per_prompt, speeds = zip(*ordered, strict=True)
        found.append(Row(name, all_metrics, per_prompt, link, speeds))
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
    if weight is activation is None and config.get("quant.policy.activation_bits", 16) < 16:  # quant=external/...
        weight, activation = (config.get(f"quant.policy.{side}_bits") for side in ("weight", "activation"))
    return f"W{weight:g}A{activation:g}" if weight and activation else ""


def of_widths(runs: Runs) -> dict[str, Runs]:
    """Width -> the runs of a model, least bits first."""
    found: dict[str, Runs] = defaultdict(dict)
    for folder, run in runs.items():
        found[width_of(run[1])][folder] = run
    return dict(sorted(found.items()))


def panels_of(board: Board, costs: Sequence[str]) -> list[Panel]:
    """Plots of a model's first metric against some of COSTS; without those that no run has, which are named."""
    panels = []
    scored = [(row, score) for row in board.rows if (score := row.score(board.first))]
    for cost, attribute in (COSTS[name] for name in costs):
        points = [Point(row.name, getattr(row, attribute), s.value, *s.bounds) for row, s in scored]
        known = [point for point in points if not math.isnan(point.cost)]
        if known or not points:
            panels.append(Panel(cost, known))
        else:
            print(f"{board.title} is not plotted against {cost}: {NOT_MEASURED}", file=sys.stderr)
    if not panels:
        raise UserError(f"--costs {' '.join(costs)}, {board.title}: {NOT_MEASURED}. Choose {' or '.join(COSTS)}.")
    return panels


def plot(board: Board, panels: Sequence[Panel], path: Path) -> list[Path]:
    """Pareto plots of a model's first metric."""
    label = board.metrics[board.first]
    title = f"{board.model}: {label['label']} against cost"
    return pareto_picture(panels, heading(label), bool(label["higher_is_better"]), board.bars, title, path)


def write(path: Path, text: str) -> Path:
    """A text file, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text)
    return path


def interval_of(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of a mean over prompts."""
    return bootstrap_interval(torch.tensor(values, dtype=torch.float64))


def make_boards(model: str, runs: Runs, beside: Path, metric: str | None, by_width: bool) -> list[Board]:
    """Those of a model: for the inputs of most rows one, or one for each width, and then the same for other inputs."""
    found = {width: rows(part, beside) for width, part in (of_widths(runs) if by_width else {"": runs}).items()}
    groups = by_inputs([row for part in found.values() for row in part])
    unranked = [group for group in groups if not directed(labels_of(group))]
    if unranked != groups:
        names = [row.name for group in unranked for row in group]
        sys.stderr.writelines(f"left out: {name} of {model} has no metric that ranks runs\n" for name in names)
        groups = [group for group in groups if group not in unranked]
    boards = []
    for number, group in enumerate(groups, 1):
        metrics, apart = labels_of(group), what_differs(group[0], groups[0][0])
        what = f"{model}, inputs {number}: {apart}" if apart else model
        wanted = metric if metric in metrics else None
        if wanted != metric:
            print(f"{what} was not measured by {metric}: ranked by its first metric", file=sys.stderr)
        first = ranking_metric(what, metrics, wanted)
        for width, part in found.items():
            if mine := [row for row in part if row.inputs == group[0].inputs]:
                board = make_board(model, mine, metrics, first, interval_of)
                boards.append(replace(board, width=width, inputs=number, apart=apart))
    return boards


def leaderboard(arguments: list[str], out: Path, metric: str | None, by_width: bool, costs: Sequence[str]) -> None:
    """Write <out>.html, .md, .csv and the pictures of each model as .png and .svg; print the tables."""
    runs = unrepeated(read(find(arguments)))
    measured = sorted({name for metrics, *_ in runs.values() for name in metrics["metrics"]})
    if metric is not None and metric not in measured:
        raise UserError(f"--metric {metric} was not measured. Choose one of {', '.join(measured)}.")
    boards: list[Board] = []
    files: list[Path] = []
    pictures: dict[str, list[tuple[str, str]]] = {}
    summary = []
    for model in sorted({metrics["model"] for metrics, *_ in runs.values()}):
        of_model = {folder: run for folder, run in runs.items() if run[0]["model"] == model}
        found = make_boards(model, of_model, out.parent, metric, by_width)
        whole = make_boards(model, of_model, out.parent, metric, False)[0] if by_width else found[0]
        panels = panels_of(whole, costs)
        alt = PARETO_ALT.format(model, ", ".join(panel.cost for panel in panels))
        drawn = [(alt, plot(whole, panels, out.with_name(f"{out.name}_{model}")))]
        if by_width:
            mine = [board for board in found if board.inputs == 1]
            drawn.append((WIDTHS_ALT.format(model), widths_picture(mine, out.with_name(f"{out.name}_{model}_widths"))))
            label = heading(mine[0].metrics[mine[0].first])
            summary.append(f"### {model}: {label} of each method at each width\n\n{methods_table(mine)}\n\n{BOLD}\n\n")
        files += [file for _, pair in drawn for file in pair]
        pictures[found[0].title] = [(alt, data_uri(pair[1])) for alt, pair in reversed(drawn)]
        boards += found
    tables = "".join(summary) + markdown(boards)
    files += [write(Path(f"{out}.md"), tables), write(Path(f"{out}.csv"), comma_separated(boards))]
    files += [write(Path(f"{out}.html"), page(boards, pictures))]
    print(tables)
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
