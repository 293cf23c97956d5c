"""The leaderboard's page: one self-contained file that sorts and filters, with the worst pair of each row."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from viditq.report.leaderboard import Board
from viditq.report.page import content_policy, joined, template
from viditq.report.paired import paired_text
from viditq.report.row import Row
from viditq.report.wording import three_digits

NUM_METRICS = 4  # shown at first; the others on demand, so that a table fits 1400 pixels
STYLES, SCRIPTS = ("page.css", "board.css"), ("board.js",)
SPREAD = re.compile(r"^(?P<value>[^ ]+) (?:\[(?P<low>[^,]+), (?P<high>[^\]]+)\]|(?P<error>± \S+?))(?P<star>\*?)$")


@dataclass(frozen=True)
class WorstPair:
    """The float and the quantized picture as data: addresses, the prompt, and its score in words."""

    reference: str
    sample: str
    prompt: str
    score: str


@dataclass(frozen=True)
class Column:
    """best: "high" or "low", "" where neither end is better. more: hidden at first."""

    label: str
    best: str = ""
    more: bool = False


@dataclass(frozen=True)
class Cell:
    """Text, a smaller line below it, and what the column sorts by (nan: nothing)."""

    text: str
    detail: str
    key: float | str


def board_page(
    boards: Sequence[Board], pictures: Mapping[str, Sequence[tuple[str, str]]], worst: Mapping[str, WorstPair]
) -> str:
    """The page as text. pictures: below the board of that title, in words and as data: addresses; worst: by the
    folder of a row. Everything from runs is escaped.
    """
    style, script = joined(STYLES), joined(SCRIPTS)
    all_columns = {board.title: columns(board) for board in boards}
    order = {column.label: column for found in all_columns.values() for column in found}
    return template("leaderboard.html").render(
        boards=boards,
        columns=all_columns,
        order=list(order.values()),
        cells={board.title: [cells(board, row) for row in board.rows] for board in boards},
        pictures=pictures,
        worst=worst,
        legend=list(dict.fromkeys(note for board in boards for note in board.legend)),
        style=Markup(style),
        script=Markup(script),
        policy=content_policy(style, script),
    )


def columns(board: Board) -> list[Column]:
    """What stands in a row behind its pictures and its name."""
    label = board.metrics[board.first]
    above = [Column(f"{label['label']} to the row above")] if board.above else []
    rest = [name for name in board.metrics if name != board.first]
    ends = {True: "high", False: "low", None: ""}

    def metric(name: str, more: bool = False) -> Column:
        found = board.metrics[name]
        return Column(f"{found['label']} {found['unit']}".strip(), ends[found["higher_is_better"]], more)

    return [
        Column("W bits", "low"),
        Column("A bits", "low"),
        Column("MB on disk", "low"),
        Column("MB in memory", "low"),
        Column("step", "low"),
        metric(board.first),
        *above,
        *(metric(name, i >= NUM_METRICS - 1) for i, name in enumerate(rest)),
        Column("verdict"),
    ]


def cells(board: Board, row: Row) -> list[Cell]:
    """One for each column."""
    step, memory = row.step, row.memory_megabytes
    took, _, against = step.text.partition(", ") if step else ("not measured", "", "")
    paired = board.above.get(row.name)
    above = [spread(paired_text(paired), paired[0] if paired else math.nan)] if board.above else []
    scores = {name: row.score(name) for name in board.metrics}
    shown = {name: spread(s.text, s.value) if s else Cell("-", "", math.nan) for name, s in scores.items()}
    first = shown.pop(board.first)
    return [
        *(Cell(f"{value:.2f}", "", value) for value in (row.weight_bits, row.activation_bits, row.megabytes)),
        Cell("not measured" if math.isnan(memory) else three_digits(memory), "", memory),
        Cell(took, against, row.step_milliseconds),
        first,
        *above,
        *shown.values(),
        Cell(row.verdict or "-", "", row.verdict),
    ]


def spread(text: str, key: float) -> Cell:
    """`45.5 [44.0, 47.0]*` as the value, starred, and below it `44.0 to 47.0`; `45.5 ± 0.3` in the same way."""
    found = SPREAD.match(text)
    if found is None:
        return Cell(text, "", key)
    detail = found["error"] or f"{found['low']} to {found['high']}"
    return Cell(found["value"] + found["star"], detail, key)
