"""`viditq which`: of finished runs, the ones to take, in five rows a model.

What is called better is better in the paired difference over the same prompts and noise, with its 95 % interval.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from viditq.errors import UserError
from viditq.files import is_whole
from viditq.report.inputs import by_inputs, what_differs
from viditq.report.leaderboard import heading, table_line
from viditq.report.paired import Paired, paired_text
from viditq.report.row import Row, directed, labels_of, ranking_metric
from viditq.run_dir import CONFIG
from viditq.sweeps.gathered import Runs, find, interval_of, read, rows, unrepeated, where, width_of
from viditq.sweeps.records import read_jobs
from viditq.sweeps.unfinished import is_begun, shown

ROOM = 1.1  # of the bytes of the smallest run at 8 bits: groups and plans take a few more
HALF, NEARLY = 0.5, 0.67  # of the bytes of the best at 8 bits; of small models much stays in float
SAME_BYTES = 1.01
WORST = 3  # of those not to use, told one by one
HEADINGS = ("", "run", "", "MB", "A bits", "step", "why")
NOBODY = ("-",) * 5
ExactTargets = Callable[[Path], Sequence[str]]


@dataclass(frozen=True)
class Field:
    """Rows of one model and the same inputs; folders: row name -> those of its runs; eights: names of rows whose
    weights and activations all have 8 bits.
    """

    title: str
    rows: Sequence[Row]
    metric: str
    label: str
    higher: bool
    folders: Mapping[str, Sequence[Path]]
    eights: frozenset[str]

    def value(self, row: Row) -> float:
        """The larger the better."""
        score = row.score(self.metric)
        return -math.inf if score is None else score.value if self.higher else -score.value

    def better(self, row: Row, other: Row) -> Paired | None:
        """The paired difference to another row, where it is certainly better."""
        paired = row.minus(other, self.metric, interval_of)
        if paired is None or paired[1] is None:
            return None
        low, high = paired[1]
        return paired if (low > 0 if self.higher else high < 0) else None

    def best(self, among: Sequence[Row]) -> Row | None:
        return max(among, key=self.value, default=None)

    def equals(self, best: Row, among: Sequence[Row]) -> list[str]:
        """Names of those that the best one is not certainly better than."""
        return [row.name for row in among if row is not best and self.better(best, row) is None]


def which(arguments: Sequence[str], metric: str | None, exact_targets: ExactTargets, words: Sequence[str] = ()) -> str:
    """Markdown. arguments: folders of runs, of models that hold them, or of a sweep's records; patterns of these.

    exact_targets: artifact -> the programs that hold it exactly. words: as in `gathered.where`. Raises UserError where
    there is no finished run, or none that ranks.
    """
    found = {run.resolve(): run for folder in find([*arguments]) for run in runs_in(folder)}
    runs = unrepeated(read(where([*found.values()], words)))
    tables = []
    for model in sorted({metrics["model"] for metrics, *_ in runs.values()}):
        of_model = {folder: run for folder, run in runs.items() if run[0]["model"] == model}
        tables += [_table(field, exact_targets) for field in _fields(model, of_model, metric)]
    if not tables:
        raise UserError("None of these runs has a metric that ranks, higher or lower being better: measure psnr too.")
    return "\n\n".join(tables) + "\n"


def runs_in(folder: Path) -> list[Path]:
    """The folder if it is a run's; else those of the jobs of a sweep's records; else the runs beneath it, finished or
    not, or beneath what lies in it (`outputs` holds folders of models).
    """
    if is_begun(folder):
        return [folder]
    if jobs := [Path(job.folder) for job in read_jobs(folder)]:
        return jobs
    for below in ("*", "[!_]*/*"):  # caches and records begin with _
        if found := [file.parent for file in sorted(folder.glob(f"{below}/{CONFIG}"))]:
            return found
    return [folder]


def _fields(model: str, runs: Runs, metric: str | None) -> list[Field]:
    fields = []
    groups = [group for group in by_inputs(rows(runs, Path())) if directed(labels_of(group))]
    for number, group in enumerate(groups, 1):
        apart = what_differs(group[0], groups[0][0])
        title = f"{model}, inputs {number}: {apart}" if apart else model
        labels = labels_of(group)
        first = ranking_metric(title, labels, metric)
        folders = {row.name: [f for f, run in runs.items() if run[0] in [*row.metrics]] for row in group}
        widths = {name: {width_of(runs[f][1]) for f in of} for name, of in folders.items()}
        eights = frozenset(name for name, of in widths.items() if of == {"W8A8"})
        better = bool(labels[first]["higher_is_better"])
        fields.append(Field(title, group, first, heading(labels[first]), better, folders, eights))
    return fields


def _table(field: Field, exact_targets: ExactTargets) -> str:
    lines = [f"### {field.title}: which to use, by {field.label}", ""]
    named = [*HEADINGS[:2], field.label, *HEADINGS[3:]]
    lines += [table_line(named), "|" + "---|" * len(named)]
    eight = _at_eight(field)
    best = field.best(eight)
    half = [] if best is None else _at_half(field, best)
    without = "no run takes so few" if best else "no run has 8 bits on both sides"
    worst, why = _not_to_use(field)
    answers = {
        "best at 8 bits": _told(field, best, eight, "no run has 8 bits on both sides"),
        "best at half the bytes of that": _told(field, field.best(half), half, without, best),
        "fastest": _fastest(field),
        "best exportable": _exportable(field, exact_targets),
        "what not to use": ["see why" if worst else "-", *NOBODY[1:], why],
    }
    lines += [table_line([name, *cells]) for name, cells in answers.items()]
    return "\n".join([*lines, "", *_places(field, [*(cells[0] for cells in answers.values()), *worst])])


def _places(field: Field, names: Sequence[str]) -> list[str]:
    """How many runs were looked at where, and the folders of the rows with these names."""
    folders = [folder for row in field.rows for folder in field.folders[row.name]]
    among = ", ".join(sorted({shown(folder.parent) for folder in folders}))
    named = [row.name for row in field.rows if row.name in names]
    counted = f"Of {len(folders)} finished run{'s' * (len(folders) != 1)} in {among}"
    if not named:
        return [f"{counted}."]
    places = [f"- {name}: {', '.join(shown(folder) for folder in field.folders[name])}" for name in named]
    return [f"{counted}; the folders of those named:", "", *places]


def _at_eight(field: Field) -> list[Row]:
    sizes = [row.megabytes for row in field.rows if row.name in field.eights]
    return [row for row in field.rows if sizes and row.megabytes <= ROOM * min(sizes)]


def _at_half(field: Field, best: Row) -> list[Row]:
    for share in (HALF, NEARLY):
        if found := [row for row in field.rows if row.megabytes <= share * best.megabytes]:
            return found
    return []


def _cells(field: Field, row: Row, why: str) -> list[str]:
    score = row.score(field.metric)
    step = row.step.text if row.step else "not measured"
    return [row.name, score.text if score else "-", f"{row.megabytes:.2f}", f"{row.activation_bits:.1f}", step, why]


def _told(field: Field, best: Row | None, among: Sequence[Row], nobody: str, of: Row | None = None) -> list[str]:
    if best is None:
        return [*NOBODY, nobody]
    equal = field.equals(best, among)
    share = "" if of is None else f"{100 * best.megabytes / of.megabytes:.0f} % of its bytes; "
    if equal:
        return _cells(field, best, f"{share}not certainly better than {', '.join(equal)}")
    if not (others := len(among) - 1):
        return _cells(field, best, f"{share}no other run has so few bytes")
    return _cells(field, best, f"{share}certainly better than {others} other{'s' * (others != 1)} of so many bytes")


def _fastest(field: Field) -> list[str]:
    timed = [row for row in field.rows if row.step is not None and not row.step.emulated]
    if not timed:
        return [*NOBODY, "not measured: no run has a step without emulation (the stage benchmark)"]
    fastest = max(timed, key=lambda row: row.step.against_float if row.step else 0.0)
    assert fastest.step is not None
    slower = "; slower than float all the same" * (fastest.step.against_float < 1)
    found = list(dict.fromkeys(row.step.conditions for row in timed if row.step))
    mixed = f"; measured under different conditions ({'; '.join(found)}), so take it with care" * (len(found) > 1)
    why = f"by the ratio to float, of {len(timed)} of {len(field.rows)} runs whose step was measured{slower}{mixed}"
    return _cells(field, fastest, why)


def _exportable(field: Field, exact_targets: ExactTargets) -> list[str]:
    asked = {
        row.name: [*exact_targets(field.folders[row.name][0] / "quantized")]
        for row in field.rows
        if is_whole(field.folders[row.name][0] / "quantized" / "meta.json")
    }
    exact = [row for row in field.rows if asked.get(row.name)]
    best = field.best(exact)
    if best is None:
        return [*NOBODY, f"no other program holds any of {len(asked)} artifacts exactly (--requantize converts)"]
    equal = field.equals(best, exact)
    tied = f"; not certainly better than {', '.join(equal)}" if equal else ""
    return _cells(field, best, f"exact for {', '.join(asked[best.name])}{tied}")


def _not_to_use(field: Field) -> tuple[list[str], str]:
    """Rows that another one of no more bytes is certainly better than: the names of the worst, and what is told."""
    found = []
    for row in field.rows:
        rivals = [r for r in field.rows if r is not row and r.megabytes <= SAME_BYTES * row.megabytes]
        beaten = [(field.value(rival), rival, paired) for rival in rivals if (paired := field.better(rival, row))]
        if beaten:
            _, rival, paired = max(beaten, key=lambda one: one[0])
            told = f"{row.name}: {rival.name} is better by {paired_text(paired)} in {rival.megabytes:.2f} MB"
            found.append((abs(paired[0]), told, row.name))
    if not found:
        return [], "no run is certainly worse than another of no more bytes"
    worst = sorted(found, reverse=True)[:WORST]
    more = f"; and {len(found) - WORST} more" if len(found) > WORST else ""
    return [name for _, _, name in worst], "; ".join(told for _, told, _ in worst) + more
