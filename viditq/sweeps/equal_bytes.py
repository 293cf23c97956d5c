"""What a search is worth: its runs set beside every other run of no fewer bytes, by paired differences."""

from collections.abc import Callable, Sequence
from pathlib import Path

from viditq.errors import UserError
from viditq.report.inputs import by_inputs, what_differs
from viditq.report.leaderboard import heading, table_line
from viditq.report.paired import Paired, paired_text
from viditq.report.row import Row, directed, labels_of, ranking_metric
from viditq.sweeps.gathered import find, interval_of, read, rows, unrepeated
from viditq.sweeps.which import runs_in

ROOM = 1.02  # of its bytes: a search fills a budget to 98 %
SAME_BITS = 0.05
BYTES, COSTS = ("A bits", "MB"), ("MB in memory", "step, x float's speed")


def equal_bytes(arguments: Sequence[str], searched: Callable[[str], bool], metric: str | None = None) -> str:
    """Markdown, for each model and inputs two tables. arguments: folders of runs, or of models that hold them.

    searched: whether a run of this name is a search's. Raises UserError where no runs are finished.
    """
    runs = unrepeated(read([run for folder in find([*arguments]) for run in runs_in(folder)]))
    parts = []
    for model in sorted({metrics["model"] for metrics, *_ in runs.values()}):
        of_model = rows({folder: run for folder, run in runs.items() if run[0]["model"] == model}, Path())
        groups = [group for group in by_inputs(of_model) if directed(labels_of(group))]
        for group in groups:
            apart = what_differs(group[0], groups[0][0])
            ours = [row for row in group if searched(row.name)]
            others = [row for row in group if not searched(row.name)]
            if ours and others:
                parts.append(_tables(f"{model}: {apart}" if apart else model, ours, others, metric))
    if not parts:
        raise UserError("None of these runs is a search's with others of the same inputs beside it.")
    return "\n\n".join(parts) + "\n"


def _tables(title: str, ours: Sequence[Row], others: Sequence[Row], metric: str | None) -> str:
    labels = labels_of([*ours, *others])
    first = ranking_metric(title, labels, metric)
    higher = bool(labels[first]["higher_is_better"])
    named = heading(labels[first])
    lines = [f"### {title}: the search against the best other of its bytes", "", *_head("search", "best other", named)]
    for mine in sorted(ours, key=lambda row: row.megabytes):
        within = [row for row in others if row.megabytes <= ROOM * mine.megabytes and _no_more_bits(row, mine)]
        best = _best(within, first, higher)
        lines.append(_line(mine, best, mine.minus(best, first, interval_of) if best else None, first))
    lines += ["", f"### {title}: every run, and the search of no more bytes", "", *_head("run", "search", named, COSTS)]
    for mine in sorted(ours, key=lambda row: row.megabytes):
        lines.append(table_line([*_cells(mine, first), *_costs(mine), *"-----"]))
    differences = []
    for other in sorted(others, key=lambda row: row.megabytes):
        within = [row for row in ours if row.megabytes <= other.megabytes and _no_more_bits(row, other)]
        mine_or_none = max(within, key=lambda row: (row.activation_bits, row.megabytes), default=None)
        paired = mine_or_none.minus(other, first, interval_of) if mine_or_none else None
        differences.append(paired)
        lines.append(_line(other, mine_or_none, paired, first, _costs(other)))
    return "\n".join([*lines, "", _counted(differences, higher)])


def _head(left: str, right: str, named: str, costs: Sequence[str] = ()) -> list[str]:
    cells = [left, *BYTES, named, *costs, right, *BYTES, named, "search less the other [95 %]"]
    return [table_line(cells), "|" + "---|" * len(cells)]


def _line(left: Row, right: Row | None, paired: Paired | None, metric: str, costs: Sequence[str] = ()) -> str:
    others = _cells(right, metric) if right else "-" * 4
    return table_line([*_cells(left, metric), *costs, *others, paired_text(paired)])


def _cells(row: Row, metric: str) -> list[str]:
    score = row.score(metric)
    return [row.name, f"{row.activation_bits:.1f}", f"{row.megabytes:.2f}", score.text if score else "-"]


def _costs(row: Row) -> list[str]:
    if row.step is None:
        return ["not measured"] * len(COSTS)
    return [f"{row.memory_megabytes:.2f}", f"{row.step.against_float:.2f}{', emulated' * row.step.emulated}"]


def _no_more_bits(row: Row, than: Row) -> bool:
    """Of activations, which take no bytes."""
    return row.activation_bits <= than.activation_bits + SAME_BITS


def _best(among: Sequence[Row], metric: str, higher: bool) -> Row | None:
    scored = [(score.value, row) for row in among if (score := row.score(metric))]
    return (max if higher else min)(scored, key=lambda one: one[0])[1] if scored else None


def _counted(differences: Sequence[Paired | None], higher: bool) -> str:
    """How many are certain, and which way."""
    known = [interval for paired in differences if paired and (interval := paired[1])]
    above, below = sum(low > 0 for low, _ in known), sum(high < 0 for _, high in known)
    better, worse = (above, below) if higher else (below, above)
    return (
        f"Of {len(known)} others that the search has a run of no more bytes and activation bits for, it is certainly "
        f"better than {better} and certainly worse than {worse}; {len(known) - better - worse} are not told apart."
    )
