"""An estimate as tables on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from viditq.estimate import Estimate
from viditq.estimate.work import DONE, LEFT_OUT

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def size(value: float | None) -> str:
    """Bytes in decimal units, as disks and file managers count: `2.44 GB`."""
    if value is None:
        return "-"
    for unit, name in UNITS:
        if value >= unit:
            return f"{value / unit:.3g} {name}" if value < 999.5 * unit else f"{value / unit:.0f} {name}"
    return f"{value:.0f} B"


def duration(seconds: float | None) -> str:
    """`38 s`, `12 min`, `5.2 h`."""
    if seconds is None:
        return "-"
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def show(console: Console, name: str, model: str, estimate: Estimate) -> None:
    """Print the estimate."""
    how = "a forward of a whole batch was timed" if estimate.durations else "from the configuration alone"
    console.print(
        f"[bold]Estimate[/bold] of {name} on {model}, batches of {estimate.batch_size}: {how}; nothing was run."
    )
    console.print(parts_table(estimate))
    console.print(weights_table(estimate))
    if estimate.encoders:
        console.print(encoders_table(estimate))
    console.print(backends_table(estimate))
    console.print(stages_table(estimate))
    console.print(disk_table(estimate))
    for remark in estimate.remarks:
        console.print(remark, style="dim", markup=False)


def new_table(title: str, *columns: str) -> Table:
    """An empty table."""
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def parts_table(estimate: Estimate) -> Table:
    """The pipeline's models."""
    table = new_table("Models, as loaded", "part", "parameters", "bytes")
    for part, (count, nbytes) in estimate.parts.items():
        mark = " (denoiser)" if part in estimate.denoisers else ""
        table.add_row(f"{part}{mark}", f"{count:,}", size(nbytes))
    return table


def weights_table(estimate: Estimate) -> Table:
    """The denoiser before and after."""
    w, stored = estimate.weights, estimate.artifact + estimate.left_in_float
    table = new_table("Denoiser's weights", "", "bytes", "against 16 bits")
    table.add_row("16 bits each", size(estimate.float16), "1.00x")
    smaller = f"{estimate.float16 / stored:.2f}x smaller"
    if estimate.left_in_float:
        table.add_row("denoisers left in float, and the artifact", size(stored), smaller)
        smaller = ""
    table.add_row("artifact on disk", size(estimate.artifact), smaller)
    for label, nbytes in (
        ("codes, packed", w.codes),
        ("scales", w.scales),
        ("zero points", w.zero_points),
        ("transforms, static ranges", w.transforms),
        ("left in float, in memory", w.rest + w.buffers),
        ("what the backend adds to the codes, in memory", w.dense),
    ):
        table.add_row(f"  {label}", size(nbytes), "")
    return table


def encoders_table(estimate: Estimate) -> Table:
    """The text encoders before and after, and the whole pipeline's artifact."""
    table = new_table("Text encoders' weights", "part", "16 bits each", "on disk", "in memory", "against 16 bits")
    for name, one in estimate.encoders.items():
        smaller = f"{one.float16 / one.artifact:.2f}x smaller"
        table.add_row(name, size(one.float16), size(one.artifact), size(one.held), smaller)
    encoders = estimate.encoders.values()
    full = estimate.float16 + sum(one.float16 for one in encoders)
    disk = estimate.artifact + sum(one.artifact for one in encoders)
    held = estimate.weights.resident + sum(one.held for one in encoders)
    table.add_row("with the denoiser", size(full), size(disk), size(held), f"{full / disk:.2f}x smaller")
    return table


def backends_table(estimate: Estimate) -> Table:
    """The denoiser in memory and a step of it, in float and by each backend."""
    table = new_table("Denoiser in memory, by backend", "backend", "bytes", "against 16 bits", "a step", "")
    table.columns[-1].no_wrap = False  # a refusal is long
    for name, held in estimate.held.items():
        if held.why:
            table.add_row(name, "-", "-", "-", held.why)
            continue
        table.add_row(name, size(held.nbytes), f"{held.nbytes / estimate.float16:.2f}x", duration(held.seconds), "")
    return table


def stages_table(estimate: Estimate) -> Table:
    """Samples, forwards, time and memory of each stage."""
    gpu = any(peak.vram is not None for peak in estimate.peaks.values())
    memory = ("peak VRAM", "RAM") if gpu else ("peak RAM",)
    table = new_table("Stages", "stage", "samples", "forwards", "time", *memory, "")
    total = 0.0
    for stage, work in estimate.works.items():
        peak = estimate.peaks.get(stage) if work.note not in (DONE, LEFT_OUT) else None
        seconds = None if work.seconds is None else work.seconds / estimate.processes
        total += seconds or 0.0
        cells = [size(peak.vram)] if gpu and peak else ["-"] if gpu else []
        cells.append(size(peak.ram + estimate.base) if peak else "-")
        table.add_row(
            stage,
            f"{work.samples:,}" if work.samples else "-",
            f"{work.forwards:,}" if work.forwards else "-",
            duration(seconds),
            *cells,
            work.note,
        )
    forwards = sum(work.forwards for work in estimate.works.values())
    blank = [""] * len(memory)
    table.add_row("all", "", f"{forwards:,}", duration(total) if estimate.durations else "-", *blank, "", style="bold")
    return table


def disk_table(estimate: Estimate) -> Table:
    """What the run leaves on disk."""
    table = new_table("On disk", "", "bytes")
    for what, nbytes in estimate.disk.items():
        table.add_row(what, size(nbytes))
    return table
