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
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from viditq.cli import user_message
from viditq.errors import UserError
from viditq.files import atomic
from viditq.report.board_page import board_page
from viditq.report.inputs import by_inputs, what_differs
from viditq.report.leaderboard import Board, comma_separated, heading, make_board, markdown
from viditq.report.pareto import Panel, Point, pareto_picture
from viditq.report.row import directed, labels_of, ranking_metric
from viditq.report.widths import methods_table, widths_picture
from viditq.run_dir import check_folder
from viditq.sweeps.gathered import Runs, find, interval_of, read, rows, unrepeated, where, width_of
from viditq.sweeps.which import runs_in
from viditq.sweeps.worst_pair import worst_pairs

COSTS = {  # name -> axis, attribute of a row
    "bits": ("weight bits", "weight_bits"),
    "bytes": ("denoiser, MB", "megabytes"),
    "step": ("measured step, ms", "step_milliseconds"),
}
NOT_MEASURED = "no run has a step that was measured without emulation (the stage benchmark measures)"
PARETO_ALT = "Quality of {} against {}, with the Pareto front"
WIDTHS_ALT = "Quality of each method on {} at each pair of bit widths, with error bars"
BOLD = "Bold: the best of its width, and all whose paired 95 % interval to it includes 0."


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


def leaderboard(folders: Sequence[Path], out: Path, metric: str | None, by_width: bool, costs: Sequence[str]) -> None:
    """Write <out>.html, .md, .csv and the pictures of each model as .png and .svg; print the tables."""
    runs = unrepeated(read([*folders]))
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
    files += [write(Path(f"{out}.html"), board_page(boards, pictures, worst_pairs(boards)))]
    print(tables)
    print("\n".join(f"written: {file}" for file in reversed(files)), file=sys.stderr)


def data_uri(svg: Path) -> str:
    """A picture for a page that needs no other file."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.read_bytes()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of a run, of what holds runs, or of a sweep; or a pattern"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/leaderboard"), help="files begin with this")
    parser.add_argument("--metric", help="sorts the rows and is plotted (default: the first of the runs' metrics)")
    parser.add_argument("--widths", action="store_true", help="compare methods at equal bit widths")
    parser.add_argument(
        "--where", nargs="+", default=[], metavar="WORD", help="runs of commands with this: bits=w4a8, or bits"
    )
    parser.add_argument("--costs", nargs="+", choices=COSTS, default=[*COSTS], help="what quality is plotted against")
    args = parser.parse_args()
    try:
        check_folder(str(args.out.parent), "--out FILE")
        folders = [run for folder in find(args.runs) for run in runs_in(folder)]
        leaderboard(where([*dict.fromkeys(folders)], args.where), args.out, args.metric, args.widths, args.costs)
    except (UserError, OSError) as error:
        sys.exit(f"error: {user_message(error, '--out FILE') or error}")


if __name__ == "__main__":
    main()
