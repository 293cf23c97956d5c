"""What a sweep prints at its end: a line per job, why jobs failed, and a tuning's best settings."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from viditq.files import is_held, read_json
from viditq.report.table import value_and_error
from viditq.sweeps.records import JobRecord, distinct_overrides

STATES = {
    "done": "done",
    "failed": "[red]failed[/red]",
    "running": "[yellow]unfinished[/yellow]",
    "working": "[yellow]running now[/yellow]",
}
NAMES = {"done": "done", "failed": "failed", "running": "unfinished", "working": "running now"}
NAMED = 8  # of the jobs that have not begun
WIDTH = 160  # of a log file; a terminal has its own


def print_sweep(folder: Path, jobs: list[JobRecord], planned: Sequence[list[str]] = (), command: str = "") -> None:
    """The table of all jobs that have begun, what became of those that are not done, how many are, and what remains.

    planned: overrides of each job, begun or not; empty = not known. command: that goes on with the sweep.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    begun = {job.num for job in jobs}
    others = [words for number, words in enumerate(planned) if number not in begun]
    common, every = distinct_overrides([*(job.overrides for job in jobs), *others])
    apart, waiting = every[: len(jobs)], every[len(jobs) :]
    console.print()
    console.print(jobs_table(jobs, f"sweep {common}".rstrip(), apart))
    for job, what in zip(jobs, apart, strict=True):
        for line in complaints(job):
            console.print(Text(f"job {job.num}, {what or 'alone'}: {line}"), soft_wrap=True)
    counts = {NAMES[state]: [state_of(job) for job in jobs].count(state) for state in STATES}
    counts["not begun"] = len(waiting)
    total = f"{sum(counts.values())} job{'s' * (sum(counts.values()) != 1)}"
    words = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    console.print(f"{total}: {words} ({relative(folder)})", soft_wrap=True)
    if waiting:
        more = f", and {len(waiting) - NAMED} more" if len(waiting) > NAMED else ""
        console.print(Text(f"not begun: {', '.join(waiting[:NAMED])}{more}"), soft_wrap=True)
    if command and (waiting or counts["unfinished"]):
        console.print(Text(f"go on with: {command}"), soft_wrap=True)
    if (folder / "best.json").is_file():
        print_best(console, read_json(folder / "best.json"))


def jobs_table(jobs: list[JobRecord], title: str, apart: list[str]) -> Table:
    """JobRecord, state, first metric with its error, average bits, megabytes, seconds of sampling, folder."""
    table = Table(title=Text(title), title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("#", justify="right")
    table.add_column("job", overflow="fold")
    table.add_column("state", no_wrap=True)
    names = {first_metric(job)[0] for job in jobs if job.metrics}
    table.add_column(names.pop() if len(names) == 1 else "first metric", justify="right", no_wrap=True)
    for name in ("W / A bits", "MB", "sampling s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("folder", overflow="fold")
    for job, what in zip(jobs, apart, strict=True):
        cells = numbers(job, named=bool(names)) if job.metrics else ["-"] * 4
        table.add_row(str(job.num), Text(what), STATES[state_of(job)], *cells, Text(relative(Path(job.folder))))
    return table


def first_metric(job: JobRecord) -> tuple[str, str]:
    """Its name with the unit, and the value with its standard error."""
    name = next(iter(job.metrics["metrics"]))
    label, value = job.metrics["labels"][name], job.metrics["metrics"][name]
    shown = "undefined" if value is None else value_and_error(value, job.metrics["standard_errors"].get(name))
    return f"{label['label']} {label['unit']}".rstrip(), shown


def numbers(job: JobRecord, named: bool) -> list[str]:
    """The cells of a job that has metrics; `named` where the jobs' first metrics differ."""
    m, (name, value) = job.metrics, first_metric(job)
    bits = f"{m['average_weight_bits']:.2f} / {m['average_activation_bits']:.2f}"
    seconds = m["seconds"].get("generate")
    return [
        f"{name} {value}" if named else value,
        bits,
        f"{m['size_bytes'] / 1e6:.2f}",
        "-" if seconds is None else f"{seconds:.1f}",
    ]


def state_of(job: JobRecord) -> str:
    """Its status, `working` for one that a process is at: the record does not tell it from one that was killed."""
    return "working" if job.status == "running" and is_held(Path(job.folder)) else job.status


def complaints(job: JobRecord) -> list[str]:
    """Why a job is not done, and which gates it failed."""
    gates = [f"gate failed: {gate}" for gate in job.gate_failures]
    if job.status == "failed":
        return [f"failed: {job.message.splitlines()[0] if job.message else 'no message'}", *gates]
    if (state := state_of(job)) == "working":
        return ["running now, in a process of its own", *gates]
    if state == "running":
        why = job.message or "its process was stopped, or is only loading"
        return [f"unfinished: {why}. The same command continues it.", *gates]
    return gates


def print_best(console: Console, best: dict[str, Any]) -> None:
    """What a tuning found, and how to run it."""
    console.print(Text(f"best {best['objective']}: {best['value']:.6g} in trial {best['trial']}"))
    for name, value in best["params"].items():
        console.print(Text(f"  {name} {value:g}"))
    console.print(Text(f"run it: {best['command']}"), soft_wrap=True)


def relative(path: Path) -> str:
    """Seen from the current folder if it lies below it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
