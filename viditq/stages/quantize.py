"""Stage `quantize`: plan, transforms and integer codes as an artifact."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from viditq.files import write_json
from viditq.job import Job
from viditq.quant.artifact import save_denoiser, size_bytes
from viditq.quant.calibration.observers import CalibrationStats
from viditq.quant.calibration.step_shares import step_shares
from viditq.quant.convert import quantize_denoiser
from viditq.quant.description.plan import QuantPlan
from viditq.quant.reconstruction.learn import BlockReconstruction
from viditq.quant.reconstruction.store import BlockStore
from viditq.stages.calibrate import observe
from viditq.stages.correct import correct, uncorrected
from viditq.stages.incoherence import calibrated_incoherence, quantized_weights, restore_incoherence


def quantize(job: Job) -> str:
    """Fit transforms, quantize the weights, write the artifact, on the first process."""
    folder = job.run_dir.artifact
    if job.processes.first_does(folder.is_dir):
        for leftover in (uncorrected(job), job.run_dir.learned_blocks):  # of a kill
            job.processes.first_does(partial(shutil.rmtree, leftover, ignore_errors=True))
        restore_incoherence(job)
        return f"already done ({folder})"
    if job.needs_stats:
        observe(job)
    with job.timed(job.run_dir.path, "quantize"):
        if job.experiment.quant.correction is None:
            return job.processes.first_does(lambda: _quantize(job, folder))
        return correct(job, lambda work: _quantize(job, work))


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

    device = job.experiment.make_trainer().strategy.root_device
    return BlockReconstruction(BlockStore(job.block_inputs.path), device, on_block, job.run_dir.learned_blocks)


def _quantize(job: Job, folder: Path) -> str:
    e, plan = job.experiment, job.plan
    stats = CalibrationStats.load(job.stats_file) if job.needs_stats else None
    pipeline = e.adapter.load()
    denoiser, floats = e.adapter.denoiser_of(pipeline), e.adapter.float_denoisers_of(pipeline)
    del pipeline
    if e.quant.float_dtype is not None:
        denoiser.to(getattr(torch, e.quant.float_dtype))
    if stats is not None:
        calibrated_incoherence(job, quantized_weights(job, denoiser), stats)
    linears = {name: m for name, m in denoiser.named_modules() if isinstance(m, nn.Linear)}
    all_that_run = linears | {name: m for name, m in floats.named_modules() if isinstance(m, nn.Linear)}
    numel = {name: m.weight.numel() for name, m in all_that_run.items()}
    in_features = {name: m.in_features for name, m in all_that_run.items()}
    left_in_float = _bytes_in_half(floats)
    shares = step_shares(stats, plan.edges) if stats is not None else None
    meta = {
        "model": e.adapter.to_dict(),
        "weights": e.weights,
        "float_dtype": e.quant.float_dtype,
        "average_weight_bits": plan.average_weight_bits(numel, in_features, shares),
        "average_activation_bits": plan.average_activation_bits(in_features, shares),
        "float_size_bytes": _bytes_in_half(denoiser) + left_in_float,
        "left_in_float_bytes": left_in_float,
        "stats": job.stats.path.name if stats else None,
    }
    reconstruct = _reconstruction(job, plan) if plan.learned_blocks else None
    quantize_denoiser(denoiser, plan, stats, e.backend, e.adapter.timestep_scale, reconstruct)
    save_denoiser(folder, denoiser, plan, meta)
    shutil.rmtree(job.run_dir.learned_blocks, ignore_errors=True)
    return f"{len(plan.layers)} of {len(linears)} Linears, {size_bytes(folder) / 1e6:.2f} MB ({folder})"


def _bytes_in_half(module: nn.Module) -> int:
    return sum(2 * p.numel() for p in module.parameters())
