"""Part of stage `quantize`: what can be foretold of the quantized denoiser's error becomes a part of the artifact."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from viditq.engine.partials import Partials
from viditq.engine.sampling import Correcting, batches_of, run_batches
from viditq.job import Job
from viditq.models.sampler_noise import check_shrinkable
from viditq.quant.artifact import OWN_KEYS, PLAN, read_meta, size_bytes
from viditq.quant.artifact_writer import save_with
from viditq.quant.calibration.context import StepContext
from viditq.quant.correction.ptqd import CorrectionFit, attach_corrections
from viditq.quant.description.plan import QuantPlan


def uncorrected(job: Job) -> Path:
    """Where the artifact lies until it is corrected."""
    return job.run_dir.path / "uncorrected"


def correct(job: Job, quantize: Callable[[Path], str]) -> str:
    """Let `quantize` make an artifact, compare it with float on the calibration prompts, each process its share."""
    e, processes, work = job.experiment, job.processes, uncorrected(job)
    if not processes.first_does((work / "quantized").is_dir):
        quantize(work / "quantized")
    partials = Partials(work, CorrectionFit.merge_states)
    done = processes.first_does(partials.compact)
    prompts = e.data.calibration_prompts
    batches = [b for b in enumerate(batches_of(len(prompts), e.adapter.calibration_batch_size)) if b[0] not in done]
    pipeline, quantized = job.load_float(), job.load_quantized(work / "quantized")
    denoiser, other = (e.adapter.denoiser_of(p) for p in (pipeline, quantized))
    shrinks = e.quant.shrinks_noise and check_shrinkable(pipeline.scheduler, e.adapter.call)
    scheduler = pipeline.scheduler if shrinks else None
    fit: Any = CorrectionFit(denoiser, other, e.adapter.timestep_scale, e.num_buckets, scheduler)
    arguments = (e.adapter, pipeline, job.load_embeds(prompts), e.seed)
    module = Correcting(*arguments, accumulator=fit, quantized=other, partials=partials, rank=processes.rank)
    run_batches(e.make_trainer(), module, processes.share(batches))
    processes.wait()
    return processes.first_does(lambda: _write(job, work, partials))


def _write(job: Job, work: Path, partials: Partials) -> str:
    e, folder, source = job.experiment, job.run_dir.artifact, work / "quantized"
    plan, old = QuantPlan.from_json((source / PLAN).read_text()), read_meta(source)
    denoiser = e.adapter.build_denoiser()
    before = {*denoiser.state_dict()}
    attach_corrections(denoiser, partials.gathered().state, StepContext(plan.edges, old["timestep_scale"]))
    tensors = {name: tensor for name, tensor in denoiser.state_dict().items() if name not in before}
    meta = {name: value for name, value in old.items() if name not in OWN_KEYS}
    save_with(source, folder, tensors, plan, meta | {"correction": e.quant.correction})
    shutil.rmtree(work)
    return f"{len(plan.layers)} Linears, output corrected, {size_bytes(folder) / 1e6:.2f} MB ({folder})"
