"""What a run prints at its end."""

import logging
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from viditq import log_file
from viditq.errors import GateFailed
from viditq.files import is_whole, read_json
from viditq.finished import Finished
from viditq.gate import Gate
from viditq.metrics.headline import headline
from viditq.report.speed import speed_line
from viditq.report.stage_seconds import not_comparable
from viditq.report.table import MetricRow, metrics_table, verdict_table
from viditq.report.text_encoders import text_encoder_lines
from viditq.run_dir import RunDir
from viditq.seconds import read_conditions

MIN_WIDTH, LOG_WIDTH = 80, 100


class Lines(logging.Handler):
    """What viditq itself logs, each record a line of the run's output."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(f"      {record.getMessage()}", markup=False)


def show_lines(console: Console) -> None:
    """From now on what viditq logs is printed there, such as which backend a layer gets; in place of an earlier one."""
    logger = logging.getLogger("viditq")
    logger.handlers = [handler for handler in logger.handlers if not isinstance(handler, Lines)]
    logger.addHandler(Lines(console))
    logger.setLevel(logging.INFO)
    logger.propagate = False


class Terminal(Console):
    """Prints, and adds the same to the run's log."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*objects, **options)
        if not self.quiet:
            plain = Console(file=StringIO(), highlight=False, soft_wrap=True, width=LOG_WIDTH, no_color=True)
            plain.print(*objects, **options)
            log_file.add(plain.file.getvalue().rstrip("\n"))  # type: ignore[attr-defined]


def terminal(quiet: bool = False) -> Console:
    """Where a run prints."""
    return Terminal(highlight=False, soft_wrap=True, quiet=quiet)


def print_heading(console: Console, heading: Sequence[str]) -> None:
    """heading: the experiment's name, the rest of that line, and what the model is made of."""
    name, rest, model = heading
    console.print(f"[bold]{escape(name)}[/bold]{escape(rest)}")
    console.print(model, markup=False)


def doing(console: Console, place: tuple[int, int], stage: str) -> None:
    """Which stage has begun, until the next line takes its place; in a terminal alone."""
    if console.is_terminal and not console.quiet:
        console.file.write(f"[{place[0]}/{place[1]}] {stage} ...\r")
        console.file.flush()


def print_stage(console: Console, place: tuple[int, int], stage: str, outcome: str) -> None:
    """place: the stage's number and how many there are. outcome: what it did."""
    console.print(f"[{place[0]}/{place[1]}] {stage}: {outcome}", markup=False)


def tell_finished(finished: Finished, stages: Sequence[str], run_dir: RunDir, gate: Gate) -> dict[str, Any] | None:
    """What a run says in which nothing was left to do; returns and raises as `conclude`."""
    console = terminal()
    print_heading(console, finished.heading)
    for number, stage in enumerate(stages, 1):
        print_stage(console, (number, len(stages)), stage, finished.stages[stage])
    return conclude(console, run_dir, gate)


def conclude(console: Console, run_dir: RunDir, gate: Gate) -> dict[str, Any] | None:
    """Print the summary of a run that got so far, and raise GateFailed if the numbers do not pass the gate; returns
    metrics.json's content.
    """
    if not run_dir.metrics.is_file():
        return None
    metrics: dict[str, Any] = read_json(run_dir.metrics)
    print_summary(console, metrics, run_dir)
    if failures := gate.check(metrics):
        raise GateFailed("\n".join(failures))
    return metrics


def metric_rows(metrics: Mapping[str, Any]) -> list[MetricRow]:
    """metrics.json's numbers as table rows."""
    return [
        MetricRow(
            name=metrics["labels"][name]["label"],
            value=value,
            standard_error=metrics["standard_errors"][name],
            reference_value=metrics["float_metrics"].get(name),
            higher_is_better=metrics["labels"][name]["higher_is_better"],
            unit=metrics["labels"][name]["unit"],
        )
        for name, value in metrics["metrics"].items()
    ]


def print_summary(console: Console, metrics: Mapping[str, Any], run_dir: RunDir) -> None:
    """The verdict, the table, bits and bytes, seconds, and where the picture and the artifact are."""
    if "verdict" in metrics:
        print_verdicts(console, metrics)
    else:
        title = f"{metrics['experiment']} on {metrics['model']}: {metrics['prompts']} pairs, mean ± standard error"
        console.print(metrics_table(metric_rows(metrics), title))
    bits = f"W{metrics['average_weight_bits']:.2f} A{metrics['average_activation_bits']:.2f} bits on average"
    size, full = metrics["size_bytes"] / 1e6, metrics["float_size_bytes"] / 1e6
    where = "on disk" if metrics.get("on_disk", True) else "in memory (its library cannot save it)"
    console.print(f"{bits}; denoiser {size:.2f} MB {where}, {full:.2f} MB in fp16 ({full / size:.2f}x smaller)")
    for line in text_encoder_lines(metrics):
        console.print(line, markup=False)
    speed = read_json(run_dir.speed) if is_whole(run_dir.speed) else None
    if line := speed_line(metrics.get("backend"), speed):
        console.print(line, markup=False)
    console.print("seconds: " + ", ".join(f"{stage} {s:.1f}" for stage, s in metrics["seconds"].items()))
    if line := _apart(metrics, run_dir):
        console.print(line, markup=False)
    for what, path in (
        ("report", run_dir.page),
        ("picture", run_dir.picture),
        ("metrics", run_dir.metrics),
        ("artifact", run_dir.artifact),
    ):
        if path.exists():
            console.print(f"{what}: {path}", markup=False)


def _apart(metrics: Mapping[str, Any], run_dir: RunDir) -> str:
    """Why the seconds of float and quantized samples do not compare; empty where they do."""
    if not {"reference", "generate"} <= metrics["seconds"].keys() or not is_whole(run_dir.per_prompt):
        return ""
    reference = Path(str(read_json(run_dir.per_prompt)["reference"]))
    return not_comparable(metrics["seconds"], {**read_conditions(reference), **read_conditions(run_dir.path)})


def print_verdicts(console: Console, metrics: Mapping[str, Any]) -> None:
    """The headline, the table, and the warnings its stars stand for."""
    verdicts, labels = metrics["verdict"], metrics["labels"]
    console.print()
    console.print(headline(verdicts, labels), style="bold", markup=False)
    console.print()
    table = titled_table(metrics)
    if console.width < MIN_WIDTH:
        table.width = MIN_WIDTH  # a narrower terminal wraps the lines; no number is cut
    console.print(table)
    for warning in dict.fromkeys(entry["warning"] for entry in verdicts.values() if entry["warning"]):
        names = ", ".join(labels[name]["label"] for name, entry in verdicts.items() if entry["warning"] == warning)
        console.print(f"* {names}: {warning}", style="yellow", markup=False)


def titled_table(metrics: Mapping[str, Any]) -> Table:
    """The table of verdicts under what it is of."""
    title = f"{metrics['experiment']} on {metrics['model']}: mean of {metrics['prompts']} pairs"
    floor = metrics.get("noise_floor")
    title += f", noise floors of the first {floor['num_prompts']}" if floor else ""
    return verdict_table(metrics["verdict"], metrics["labels"], title)
