"""Methods side by side at equal bit widths: a table of methods by widths, and a picture with a panel for each width."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from viditq.report.leaderboard import Board, heading, table_line
from viditq.report.pareto import FRONT, GREY, INK, save_both
from viditq.report.row import Score


def methods_table(boards: Sequence[Board]) -> str:
    """Markdown: a row per method, a column per width, each the first metric's value with its error; best first.

    boards: of one model and the same inputs, one per width, each named `width`. Bold: the best of its width and every
    method whose paired interval with the best includes 0.
    """
    names = list(dict.fromkeys(row.name for board in boards for row in board.rows))
    ranks = {name: _mean_place(boards, name) for name in names}
    lines = [table_line(["method", *(board.width for board in boards)]), "|" + "---|" * (len(boards) + 1)]
    for name in sorted(names, key=lambda name: (ranks[name], name)):
        lines.append(table_line([name, *(_cell(board, name) for board in boards)]))
    return "\n".join(lines)


def _mean_place(boards: Sequence[Board], name: str) -> float:
    """From 0, the best, to below 1, over the widths at which the method was run."""
    places = [[row.name for row in board.rows].index(name) / len(board.rows) for board in boards if _has(board, name)]
    return sum(places) / len(places)


def _has(board: Board, name: str) -> bool:
    return any(row.name == name for row in board.rows)


def _cell(board: Board, name: str) -> str:
    row = next((row for row in board.rows if row.name == name), None)
    score = row.score(board.first) if row else None
    if row is None or score is None:
        return "-"
    return f"**{score.text}**" if row is board.rows[0] or board.as_good_as_best(row) else score.text


def widths_picture(boards: Sequence[Board], path: Path) -> list[Path]:
    """Dots with error bars of the first metric, a panel per width, best method on top; .png and .svg of `path`."""
    most = max(len(board.rows) for board in boards)
    label = boards[0].metrics[boards[0].first]
    with matplotlib.rc_context({"font.size": 9, "svg.hashsalt": "viditq", "svg.fonttype": "path"}):
        figure = Figure(figsize=(3.6 * len(boards), 1.5 + 0.27 * most), layout="constrained")
        FigureCanvasAgg(figure)
        figure.supxlabel(f"Bars: {boards[0].bars}.", x=0.01, ha="left", fontsize=8.5, color=INK)
        figure.suptitle(f"{boards[0].model}: {label['label']} of each method", fontweight="bold", color=INK)
        for axis, board in zip(figure.subplots(1, len(boards), squeeze=False)[0], boards, strict=True):
            _draw(axis, board, label)
        return save_both(figure, path)


def _draw(axis: Axes, board: Board, label: Any) -> None:
    scored: list[tuple[str, Score]] = [(r.name, s) for r in board.rows if (s := r.score(board.first))]
    for place, (_, score) in enumerate(scored):
        low, high = score.bounds
        bars = [[max(score.value - low, 0)], [max(high - score.value, 0)]]
        colour = FRONT if place == 0 or board.as_good_as_best(board.rows[place]) else GREY
        axis.errorbar(score.value, place, xerr=bars, color=colour, marker="o", markersize=4.5, capsize=2.5, lw=1)
    axis.set_yticks(range(len(scored)), [name for name, _ in scored])
    axis.invert_yaxis()
    axis.set_title(board.width, fontsize=10, color=INK)
    axis.set_xlabel(f"{heading(label)} ({'higher' if label['higher_is_better'] else 'lower'} is better)")
    axis.margins(x=0.08)
    axis.grid(axis="x", color="#e8eaed", lw=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
