"""Stage `quantize`: plan, transforms and integer codes as an artifact."""

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from viditq.files import write_json
from viditq.job import Job
from viditq.models.dtypes import DTYPES
from viditq.models.mapped_weights import map_denoiser, retyped
from viditq.quant.artifact import FORMAT_VERSION, OWN_KEYS, read_meta, size_bytes
from viditq.quant.artifact_writer import ArtifactWriter, save_with
from viditq.quant.calibration.statistics import CalibrationStats
from viditq.quant.calibration.step_shares import step_shares
from viditq.quant.convert import Conversion
from viditq.quant.description.plan import QuantPlan
from viditq.quant.reconstruction.learn import BlockReconstruction
from viditq.quant.reconstruction.store import BlockStore
from viditq.quant.streaming import Streaming
from viditq.stages.calibrate import observe
from viditq.stages.card import update_card
from viditq.stages.correct import correct, uncorrected
from viditq.stages.external import skipped
from viditq.stages.incoherence import calibrated_incoherence, quantized_weights, restore_incoherence
from viditq.stages.shared_codes import settled
from viditq.stages.text_encoders import quantize_encoders

TELL_SECONDS = 10


def quantize(job: Job) -> str:
    """The denoiser, then the text encoders where that is asked for."""
    if why := skipped(job, "quantize"):
        return why
    lines = [_denoiser(job), *quantize_encoders(job)]
    update_card(job)
    return "; ".join(lines)


def _denoiser(job: Job) -> str:
    """Fit transforms, quantize the weights, write the artifact."""
    folder = job.run_dir.artifact
    if job.processes.first_does(folder.is_dir):
        for leftover in (uncorrected(job), job.run_dir.learned_blocks):  # of a kill
            job.processes.first_does(partial(shutil.rmtree, leftover, ignore_errors=True))
        restore_incoherence(job)
        return f"already done ({folder})"
    if job.needs_stats:
        observe(job)
    with job.timed(job.run_dir.path, "quantize"):
        if (stored := job.stored_artifact) is not None:
            return job.processes.first_does(lambda: _taken(job, stored.folder, folder))
        if job.experiment.quant.correction is None:
            return _quantize(job, folder)
        return correct(job, lambda work: _quantize(job, work))


def _taken(job: Job, source: Path, folder: Path) -> str:
    """An artifact made before becomes the run's, its codes as they are."""
    e, plan, old = job.experiment, job.plan, read_meta(source)
    kept = {key: value for key, value in old.items() if key not in OWN_KEYS}
    meta = {**_told(job, e.adapter.build_denoiser(), plan, None), **kept}
    save_with(source, folder, {}, plan, meta | {"model": e.adapter.to_dict(), "weights": e.weights})
    return f"{len(plan.layers)} Linears, as they are in {source} ({folder})"


def _reconstruction(job: Job, plan: QuantPlan) -> BlockReconstruction:
    """What learning by block needs; each block is told of when it is done, and recorded in the run's folder."""
    records: list[dict[str, Any]] = []
    total = len(plan.learned_blocks)

    def on_block(record: dict[str, Any]) -> None:
        records.append(record)
        write_json(job.run_dir.reconstruction, records)
        left = sum(r["seconds"] for r in records) / len(records) * (total - len(records))
        errors = ", ".join(f"{100 * error**0.5:.3g} % {how}" for how, error in record["errors"].items())
        job.say(
            f"      block {len(records)}/{total} {record['block']}: error of its output {errors}; "
            f"kept {record['kept']}; {record['seconds']:.1f} s, about {left:.0f} s left"
        )

    device = job.experiment.device
    return BlockReconstruction(BlockStore(job.block_inputs.path), device, on_block, job.run_dir.learned_blocks)


def _quantize(job: Job, folder: Path) -> str:
    """Each process its share of the shards; where blocks are learned, the first does all."""
    e, plan, processes = job.experiment, job.plan, job.processes
    job.let_go_of_float()
    stats = CalibrationStats.load(job.stats_file) if job.needs_stats else None
    denoiser, runs = map_denoiser(e.adapter)
    if e.quant.float_dtype is not None:
        runs = retyped(denoiser, runs, DTYPES[e.quant.float_dtype])
    if stats is not None and processes.first:
        calibrated_incoherence(job, quantized_weights(job, denoiser), stats)
    reconstruct = _reconstruction(job, plan) if plan.learned_blocks else None
    plan, decided = settled(job, plan, denoiser, stats)
    backend = "fake" if e.backend == "auto" else e.backend  # nothing is multiplied: asked what it takes
    conversion = Conversion(denoiser, plan, stats, backend, e.adapter.timestep_scale, reconstruct, runs)
    streaming = Streaming(conversion, runs)
    writer = ArtifactWriter(folder, folder.with_name(f"{folder.name}.partial"), len(streaming.shards))
    missing = processes.first_does(lambda: writer.begin(_key(job, plan)))
    if len(missing) < len(streaming.shards):
        job.say(f"      {len(streaming.shards) - len(missing)} of {len(streaming.shards)} shards are there")
    mine = processes.share(missing) if reconstruct is None else missing if processes.first else []
    progress = Progress(sum(map(streaming.num_weights, mine)), job.say if processes.first else _quiet)
    for index in mine:
        writer.write(index, streaming.header_bytes(index), streaming.contents(index, progress.add))
    processes.wait()

    def finish() -> str:
        writer.finish(plan, _told(job, denoiser, plan, stats) | decided, e.adapter.timestep_scale)
        shutil.rmtree(job.run_dir.learned_blocks, ignore_errors=True)
        num_linears = sum(isinstance(m, nn.Linear) for m in denoiser.modules())
        return f"{len(plan.layers)} of {num_linears} Linears, {size_bytes(folder) / 1e6:.2f} MB ({folder})"

    return processes.first_does(finish)


def _quiet(line: str) -> None:
    """Say nothing."""


class Progress:
    """Says every ten seconds how much is quantized, and how long the rest will take."""

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self._total, self._say, self._done = total, say, 0
        self._began = self._told = time.monotonic()

    def add(self, num_weights: int) -> None:
        """Count what was done."""
        self._done += num_weights
        now = time.monotonic()
        if now - self._told > TELL_SECONDS and self._done < self._total:
            left = (now - self._began) * (self._total / self._done - 1)
            self._say(f"      {100 * self._done / self._total:.0f} % quantized, about {left:.0f} s left")
            self._told = now


def _key(job: Job, plan: QuantPlan) -> dict[str, Any]:
    """What decides the tensors of an artifact."""
    e = job.experiment
    return {
        "model": e.adapter.to_dict(),
        "weights": e.weights,
        "plan": plan.to_json(),
        "float_dtype": e.quant.float_dtype,
        "stats": job.stats.path.name if job.needs_stats else None,
        "format": FORMAT_VERSION,
    }


def _told(job: Job, denoiser: nn.Module, plan: QuantPlan, stats: CalibrationStats | None) -> dict[str, Any]:
    """What meta.json says of where it comes from. denoiser: the float one, which may be on meta."""
    e = job.experiment
    floats = e.adapter.build_float_denoisers()
    named = [*denoiser.named_modules(), *floats.named_modules()]
    linears = {name: m for name, m in named if isinstance(m, nn.Linear)}
    numel = {name: m.weight.numel() for name, m in linears.items()}
    in_features = {name: m.in_features for name, m in linears.items()}
    left_in_float = _bytes_in_half(floats)
    shares = step_shares(stats, plan.edges) if stats is not None else None
    return {
        "model": e.adapter.to_dict(),
        "weights": e.weights,
        "float_dtype": e.quant.float_dtype,
        "average_weight_bits": plan.average_weight_bits(numel, in_features, shares),
        "average_activation_bits": plan.average_activation_bits(in_features, shares),
        "float_size_bytes": _bytes_in_half(denoiser) + left_in_float,
        "left_in_float_bytes": left_in_float,
        "stats": job.stats.path.name if stats else None,
        **({"text_encoders": [*e.encoder_plans]} if e.encoder_plans else {}),
    }


def _bytes_in_half(module: nn.Module) -> int:
    return sum(2 * p.numel() for p in module.parameters())
