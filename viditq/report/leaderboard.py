"""Many finished runs in one table: markdown and csv; board_page draws the page.

A row is one configuration of one model; its runs differ in the seed alone.
"""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from viditq.report.inputs import INPUTS_NOTE
from viditq.report.paired import PAIRED_NOTE, IntervalOf, Paired, paired_text
from viditq.report.row import Row
from viditq.report.table import value_and_error

SPREAD = "± is the standard error over seeds; [ ] the 95 % interval over the prompts of a single seed."
NOTE = (
    "A verdict weighs a metric against noise (metrics.json says how); equal is equal within noise. "
    "Bits and bytes count the denoiser; step is the time of one of its steps and float's divided by it, as the stage "
    "benchmark has measured them. What emulates integers in floating point is not sorted or plotted by time."
)
STEP = ("step_seconds", "step_against_float", "step_emulated", "memory_bytes")  # columns of the csv
CONDITIONS = "Steps were measured under different conditions, so compare the ratios to float: {}."


@dataclass(frozen=True)
class Board:
    """Rows of one model and the same inputs, best first by the metric `first`; `metrics`: name -> its label.

    above, best: row name -> its paired difference to the row above and to the best one, and that one's 95 % interval.
    width: of all rows (`W4A8`), where the board holds no others. inputs: 1 are those of most rows of the model; apart
    says how others differ from them.
    """

    model: str
    rows: Sequence[Row]
    metrics: Mapping[str, Mapping[str, Any]]
    first: str
    above: Mapping[str, Paired] = field(default_factory=dict)
    best: Mapping[str, Paired] = field(default_factory=dict)
    width: str = ""
    inputs: int = 1
    apart: str = ""

    @property
    def title(self) -> str:
        return f"{self.model} {self.width}".strip() + (f", inputs {self.inputs}: {self.apart}" if self.apart else "")

    def as_good_as_best(self, row: Row) -> bool:
        """True if the interval of its difference to the best row includes 0."""
        interval = self.best[row.name][1] if row.name in self.best else None
        return interval is not None and interval[0] <= 0 <= interval[1]

    @property
    def float_scores(self) -> dict[str, str]:
        """Label -> the float model's own value, of the row with the most seeds."""
        runs = max(self.rows, key=lambda row: len(row.metrics)).metrics
        found = {}
        for name, label in self.metrics.items():
            values = [run["float_metrics"].get(name) for run in runs]
            if all(v is not None for v in values):
                error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
                found[heading(label)] = value_and_error(statistics.fmean(values), error)
        return found

    @property
    def bars(self) -> str:
        """What error bars of the rows, which have the same seeds, span."""
        return (
            "standard error over seeds" if len(self.rows[0].seeds) > 1 else "95 % interval over the prompts of one seed"
        )

    @property
    def legend(self) -> list[str]:
        """What a reader has to know of any board before comparing rows."""
        return [NOTE, *([INPUTS_NOTE] if self.apart else []), *([PAIRED_NOTE] if self.above else [])]

    @property
    def remarks(self) -> list[str]:
        """What holds for this board: the float model's own values, conditions of steps, warnings."""
        notes = []
        if self.float_scores:
            values = ", ".join(f"{label} {value}" for label, value in self.float_scores.items())
            notes.append(f"Float model{f', inputs {self.inputs}' if self.apart else ''}: {values}.")
        steps = [row.step for row in self.rows]
        where = list(dict.fromkeys(step.conditions for step in steps if step and not step.emulated))
        notes += [CONDITIONS.format("; ".join(where))] if len(where) > 1 else []
        scores = [(label["label"], row.score(name)) for name, label in self.metrics.items() for row in self.rows]
        for warning in dict.fromkeys(score.warning for _, score in scores if score and score.warning):
            names = dict.fromkeys(label for label, score in scores if score and score.warning == warning)
            notes.append(f"* {', '.join(names)}: {warning}")
        return notes

    @property
    def notes(self) -> list[str]:
        """Both, and how spread is written, for a table in markdown."""
        first, *others = self.legend
        return [f"{SPREAD} {first}", *others, *self.remarks]

    @property
    def headings(self) -> list[str]:
        fixed = ["experiment", "verdict", "seeds", "pairs", "W bits", "A bits", "MB", "step"]
        paired = [f"{heading(self.metrics[self.first])} to the row above"] if self.above else []
        return [*fixed, *paired, *(heading(label) for label in self.metrics.values())]

    def cells(self, row: Row) -> list[tuple[str, float | str]]:
        """Text and sort key of each cell of a row."""
        scores = [row.score(name) for name in self.metrics]
        above = (
            [(paired_text(self.above.get(row.name)), self.above.get(row.name, (math.nan,))[0])] if self.above else []
        )
        return [
            (row.name, row.name),
            (row.verdict or "-", row.verdict),
            (str(len(row.seeds)), len(row.seeds)),
            (str(row.pairs), row.pairs),
            *((f"{value:.2f}", value) for value in (row.weight_bits, row.activation_bits, row.megabytes)),
            (row.step.text if row.step else "not measured", row.step_milliseconds),
            *above,
            *((score.text, score.value) if score else ("-", math.nan) for score in scores),
        ]


def make_board(
    model: str, rows: Sequence[Row], metrics: Mapping[str, Mapping[str, Any]], first: str, interval_of: IntervalOf
) -> Board:
    """Rows of the same inputs in order, best first by the metric `first`; rows that did not measure it come last.

    interval_of: the 95 % interval of a mean, for paired differences.
    """
    sign = -1 if metrics[first]["higher_is_better"] else 1

    def rank(row: Row) -> tuple[float, str]:
        score = row.score(first)
        return (sign * score.value if score else math.inf), row.name

    ordered = sorted(rows, key=rank)
    above = {row.name: row.minus(before, first, interval_of) for before, row in pairwise(ordered)}
    best = {row.name: row.minus(ordered[0], first, interval_of) for row in ordered[1:]}
    return Board(model, ordered, metrics, first, _known(above), _known(best))


def _known(paired: Mapping[str, Paired | None]) -> dict[str, Paired]:
    return {name: difference for name, difference in paired.items() if difference}


def heading(label: Mapping[str, Any]) -> str:
    """`PSNR dB`"""
    return f"{label['label']} {label['unit']}".strip()


def closing_notes(boards: Sequence[Board]) -> list[list[str]]:
    """What stands below each board: nothing, or, below the last one of a model, the notes of all of its boards."""
    found = []
    for board, after in zip(boards, [*boards[1:], None], strict=True):
        last = after is None or after.model != board.model
        notes = [note for other in boards if last and other.model == board.model for note in other.notes]
        found.append(list(dict.fromkeys(notes)))
    return found


def markdown(boards: Sequence[Board]) -> str:
    """A table per board; below the last one of a model what to know of all of them."""
    parts = []
    for board, notes in zip(boards, closing_notes(boards), strict=True):
        title = f"### {board.title} ({board.rows[0].pairs} pairs a seed)"
        lines = [title, "", table_line(board.headings), "|" + "---|" * len(board.headings)]
        lines += [table_line([text for text, _ in board.cells(row)]) for row in board.rows]
        parts.append("\n".join([*lines, *([""] if notes else []), *notes]))
    return "\n\n".join(parts) + "\n"


def table_line(cells: Sequence[str]) -> str:
    """One line of a markdown table."""
    escaped = (cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for cell in cells)
    return "| " + " | ".join(escaped) + " |"


def comma_separated(boards: Sequence[Board]) -> str:
    """One line per row; a metric has its value, standard error over seeds, 95 % interval of a single seed, verdict.

    step_seconds, step_against_float, step_emulated (0 or 1), memory_bytes (of the weights): of the measured step, empty
    where none was. inputs: a
    number; a model's rows of different ones do not compare. above: the paired difference of the board's first metric to
    the line above, with its 95 % interval.
    """
    names = list(dict.fromkeys(name for board in boards for name in board.metrics))
    fixed = [
        "model",
        "width",
        "inputs",
        "experiment",
        "seeds",
        "pairs",
        "weight_bits",
        "activation_bits",
        "bytes",
        *STEP,
    ]
    fixed += ["above", "above_low", "above_high"]
    measured = [f"{name}{end}" for name in names for end in ("", "_error", "_low", "_high", "_verdict")]
    out = io.StringIO()
    writer = csv.DictWriter(out, [*fixed, *measured], restval="", lineterminator="\n")
    writer.writeheader()
    for board in boards:
        for row in board.rows:
            line: dict[str, Any] = {"model": board.model, "experiment": row.name, "pairs": row.pairs}
            line |= {"seeds": " ".join(map(str, row.seeds)), "weight_bits": row.weight_bits}
            line |= {"activation_bits": row.activation_bits, "bytes": round(row.megabytes * 1e6)}
            line |= {"width": board.width, "inputs": board.inputs}
            if step := row.step:
                memory = round(row.memory_megabytes * 1e6)
                line |= dict(zip(STEP, (step.seconds, step.against_float, int(step.emulated), memory), strict=True))
            if paired := board.above.get(row.name):
                low, high = paired[1] or ("", "")
                line |= {"above": paired[0], "above_low": low, "above_high": high}
            for name in board.metrics:
                if score := row.score(name):
                    low, high = score.interval or ("", "")
                    line |= {name: score.value, f"{name}_error": "" if score.error is None else score.error}
                    line |= {f"{name}_low": low, f"{name}_high": high, f"{name}_verdict": score.verdict}
            writer.writerow(line)
    return out.getvalue()
