"""What fits, as a table on the terminal, and the commands to type."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from viditq.config import STAGES, program
from viditq.estimate.fit import Fit, Row, asked
from viditq.estimate.memory import Peak
from viditq.estimate.table import new_table, size

LOADED = "load_quantized"
REPLACED = ("fit", "estimate", "trainer.offload", "trainer.memory_budget")  # keys that a proposal decides by itself


def show_fit(console: Console, fit: Fit, words: Sequence[str]) -> None:
    """Print the settings, their peaks, and what to type. words: of the command line."""
    what = "GPU memory" if fit.gpu else "memory"
    console.print(
        f"[bold]What fits {size(fit.limit)} of {what}[/bold]: {fit.name} on {fit.model}, batches of {fit.batch_size}, "
        "from the configuration alone; nothing was run, and nothing is changed."
    )
    for number, row in enumerate(fit.rows, 1):
        typed = " ".join([*map(shlex.quote, row.overrides)]) or "nothing to type"
        console.print(f"  {number}  {row.label}: {typed}", markup=False)
    console.print(_peaks(fit, f"Peak {what}", asked))
    if fit.gpu:
        console.print(_peaks(fit, "Peak RAM", lambda peak: peak.ram))
    for line in told(fit, words):
        console.print(line, markup=False, soft_wrap=True)


def _peaks(fit: Fit, title: str, of: Callable[[Peak], int]) -> Table:
    """Stages down, settings across."""
    table = new_table(f"{title}, GB", "", *(str(number) for number in range(1, len(fit.rows) + 1)))
    for stage in (stage for stage in STAGES if any(stage in row.stages for row in fit.rows)):
        cells = (row.stages.get(stage) for row in fit.rows)
        table.add_row(stage, *("-" if peak is None else _gb(of(peak)) for peak in cells))
    table.add_row(LOADED, *(_gb(of(row.use)) for row in fit.rows))
    if of is asked:
        table.add_row("fits", *(_fits(fit, row) for row in fit.rows), style="bold")
    return table


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3g}"


def _fits(fit: Fit, row: Row) -> str:
    """The run, the use of its result, or both."""
    run, use = row.run()[1] <= fit.limit, asked(row.use) <= fit.limit
    return "both" if run and use else "run" if run else "use" if use else "-"


def told(fit: Fit, words: Sequence[str]) -> list[str]:
    """What to type for the run and for its result, or by how much nothing fits."""
    return [
        *_of_run(fit, words),
        *_of_use(fit),
        "Not counted: metrics' networks, caches. RAM includes the interpreter.",
    ]


def _of_run(fit: Fit, words: Sequence[str]) -> list[str]:
    if (row := fit.first_run()) is not None:
        stage, taken = row.run()
        most = f"{size(taken)}, in stage {stage}" if stage else "no memory"
        return [
            f"The run fits with {fit.rows.index(row) + 1}, {row.label} (at most {most}):",
            f"    {command(row, words)}",
        ]
    row = min(fit.rows, key=lambda row: row.run()[1])
    stage, taken = row.run()
    return [
        f"No run fits {size(fit.limit)}: {fit.rows.index(row) + 1}, {row.label}, takes least, {size(taken)} in stage "
        f"{stage}, which is {size(taken - fit.limit)} too much."
    ]


def _of_use(fit: Fit) -> list[str]:
    """`load_quantized` and a call."""
    if (row := fit.first_use()) is not None:
        if row.overrides == ("quant=none",):
            return ["The pipeline itself fits as it is, so that nothing need be quantized to use it."]
        budget = "" if row.use_budget is None else f', memory_budget="{row.use_budget}"'
        return [
            f"Its result fits with {fit.rows.index(row) + 1}, {row.label} ({size(asked(row.use))}); in Python:",
            f'    pipeline = viditq.load_quantized("<folder of the run>"{budget})',
        ]
    row = min(fit.rows, key=lambda row: asked(row.use))
    taken = asked(row.use)
    return [
        f"No result fits {size(fit.limit)}: {fit.rows.index(row) + 1}, {row.label}, takes least, {size(taken)}, which "
        f"is {size(taken - fit.limit)} too much."
    ]


def command(row: Row, words: Sequence[str]) -> str:
    """The command line of the run with a row's settings; words: of the one that was given."""
    decided = {*REPLACED, *(_key(word) for word in row.overrides)}
    kept = [word for word in words if _key(word) not in decided]
    return shlex.join([*program(), *kept, *row.overrides])


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")
