"""Stage `diagnose`: the quantized denoiser beside the float one on the same inputs, by layer and by noise level."""

from typing import Any

from viditq.engine.partials import Partials, State
from viditq.engine.sampling import Diagnosing, batches_of, run_batches
from viditq.files import is_whole, write_json
from viditq.job import Job
from viditq.loading import load_artifact
from viditq.quant.diagnosis import Diagnosis
from viditq.quant.error_sums import merge_states


def diagnose(job: Job) -> str:
    """Measure the errors on a few evaluation prompts, each process its share; writes errors.json."""
    path, count = job.run_dir.errors, min(job.experiment.diagnosis_prompts, job.num_prompts)
    if not count or not job.experiment.plan.layers:
        return "switched off (diagnosis.num_prompts=0)" if not count else "not needed: nothing is quantized"
    if job.processes.first_does(lambda: is_whole(path)):
        return f"already done ({path})"
    with job.timed(job.run_dir.path, "diagnose"):
        worst = _diagnose(job, Partials(job.run_dir.path, merge_states), count)
    return f"{count} prompts, worst layer {worst} ({path})"


def _diagnose(job: Job, partials: Partials, count: int) -> str:
    e, processes = job.experiment, job.processes
    done = processes.first_does(partials.compact)
    batches = [b for b in enumerate(batches_of(count, e.batch_size)) if b[0] not in done]
    pipeline = e.adapter.load()
    quantized: Any = load_artifact(job.run_dir.artifact, backend=e.backend, complete=False)
    denoiser, other = (e.adapter.denoiser_of(p) for p in (pipeline, quantized))
    diagnosis = Diagnosis(denoiser, other, job.plan, e.adapter.timestep_scale, e.num_buckets)
    arguments = (e.adapter, pipeline, job.load_embeds(e.data.prompts), e.seed)
    module = Diagnosing(*arguments, accumulator=diagnosis, quantized=other, partials=partials, rank=processes.rank)
    run_batches(e.make_trainer(), module, processes.share(batches))
    processes.wait()
    return processes.first_does(lambda: _write(job, diagnosis, partials))


def _write(job: Job, diagnosis: Diagnosis, partials: Partials) -> str:
    whole: State = partials.gathered().state
    diagnosis.load_state(whole)
    errors = diagnosis.to_json(job.experiment.roles)
    write_json(job.run_dir.errors, errors)
    partials.remove()
    totals = {name: layer["total"] for name, layer in errors["layers"].items() if layer["total"] is not None}
    name = max(totals, key=lambda name: totals[name])
    return f"{name} {100 * totals[name]:.1f} %"
