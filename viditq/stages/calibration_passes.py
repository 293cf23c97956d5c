"""The passes of a calibration: one, or several where second moments do not fit `calibration.moment_bytes` at once."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from viditq.engine.partials import PARTIAL
from viditq.files import is_whole
from viditq.job import Job
from viditq.quant.calibration.moment_passes import end_of_range
from viditq.quant.calibration.moments import matrix_bytes
from viditq.quant.calibration.statistics import CalibrationStats
from viditq.quant.calibration.step_rows import checked_linears
from viditq.quant.reconstruction.store import BlockStore
from viditq.run_dir import Entry

STATS, INPUTS, MOMENTS = "stats", "inputs", "moments"  # MOMENTS: those that the first pass has left


@dataclass(frozen=True)
class Pass:
    """wanted: what it makes. layers: whose second moments it sums up. folder: of its unfinished states; one for each
    combination, as they hold everything that its batches were sampled for. file: of its statistics in the end."""

    wanted: list[str]
    layers: list[str]
    folder: Path
    file: Path
    remarks: tuple[str, ...] = ()


def entries(job: Job) -> dict[str, Entry]:
    """What a calibration leaves."""
    return {STATS: job.stats} | ({INPUTS: job.block_inputs} if job.needs_block_inputs else {})


def left(job: Job) -> list[str]:
    """What of STATS, INPUTS and MOMENTS has yet to be made."""
    done = {STATS: is_whole(job.stats_file), INPUTS: BlockStore(job.block_inputs.path).complete}
    found = [name for name in entries(job) if not done[name]]
    return found + ([MOMENTS] if job.experiment.plan.moment_layers and (not done[STATS] or unsummed(job)) else [])


def unsummed(job: Job) -> list[str]:
    """Of the layers that lead an input, those whose moments are in no file yet, in model order."""
    missing = {*CalibrationStats.load_some(job.stats_file).moments.missing}
    return [layer for layer in job.experiment.plan.moment_layers if layer in missing]


def moment_widths(job: Job) -> dict[str, int]:
    """Layers with second moments -> in_features, in model order."""
    layers = job.experiment.plan.moment_layers
    if not layers:
        return {}
    denoiser = job.experiment.adapter.build_denoiser()
    return {name: linear.in_features for name, linear in checked_linears(denoiser, layers).items()}


def next_pass(job: Job) -> Pass | None:
    """The pass to do: that which was interrupted where it fits the budget, else the next one; None: all is done."""
    wanted, widths = left(job), moment_widths(job)
    if not wanted:
        return None
    if STATS not in wanted and INPUTS not in wanted:
        return _later_pass(job, widths)
    wanted = [name for name in wanted if name != MOMENTS]
    if wanted == [INPUTS]:
        return Pass(wanted, [], job.block_inputs.path, job.stats_file)
    names, budget = [*widths], job.experiment.moment_bytes
    joined = f"with-{job.block_inputs.path.name}" if INPUTS in wanted else ""
    whole = job.stats.path / joined
    stop = end_of_range([*widths.values()], 0, budget)
    open_ = _open(job.stats.path, f"{joined}-first" if joined else "first") | _states({len(names): whole})
    stop = max((end for end in open_ if end <= stop), default=stop)
    folder = whole if stop == len(names) else job.stats.path / (f"{joined}-first-{stop}" if joined else f"first-{stop}")
    _forget(open_, folder)
    remarks = _remarks(widths, names[:stop], len(names), budget) if stop < len(names) else ()
    return Pass(wanted, names[:stop], folder, job.stats_file, remarks)


def _later_pass(job: Job, widths: Mapping[str, int]) -> Pass:
    names, budget, missing = [*widths], job.experiment.moment_bytes, unsummed(job)
    start = names.index(missing[0])
    stop = end_of_range([widths[name] for name in missing], 0, budget)
    end = names.index(missing[stop - 1]) + 1
    open_ = _open(job.stats.path, f"moments-{start}")
    end = max((known for known in open_ if known <= end), default=end)
    layers = [name for name in missing if names.index(name) < end]
    folder = job.stats.path / f"moments-{start}-{end}"
    _forget(open_, folder)
    file = job.stats_file.with_name(f"{job.stats_file.stem}.moments-{start:05}-{end:05}.safetensors")
    return Pass([MOMENTS], layers, folder, file, _remarks(widths, layers, len(missing), budget))


def _open(parent: Path, prefix: str) -> dict[int, Path]:
    """Where ranges of interrupted passes end -> their folders."""
    folders = {int(path.name.rpartition("-")[2]): path for path in parent.glob(f"{prefix}-*") if _numbered(path)}
    return _states(folders)


def _numbered(path: Path) -> bool:
    return re.fullmatch(r"\d+", path.name.rpartition("-")[2]) is not None


def _states(folders: Mapping[int, Path]) -> dict[int, Path]:
    return {end: path for end, path in folders.items() if any(path.glob(PARTIAL))}


def _forget(open_: Mapping[int, Path], but: Path) -> None:
    """Delete states of passes that another budget had cut."""
    for folder in open_.values():
        if folder != but:
            for state in folder.glob(PARTIAL):
                state.unlink()
            if _numbered(folder):
                shutil.rmtree(folder)


def _remarks(widths: Mapping[str, int], layers: Sequence[str], of: int, budget: int) -> tuple[str, ...]:
    told = f"a pass for the second moments of {len(layers)} of {of} layers (calibration.moment_bytes={budget:,})"
    largest = matrix_bytes(widths[layers[0]])
    if largest > budget:
        told += f", as those of {layers[0]} alone take {largest:,}"
    return (told,)
