"""Stage `diagnose`: the quantized denoiser beside the float one on the same inputs, by layer and by noise level."""

from typing import Any

from torch import Tensor

from viditq.engine.partials import Partials
from viditq.engine.sampling import Diagnosing, ObservedDiagnosing, batches_of, run_batches
from viditq.files import is_whole, write_json
from viditq.job import Job
from viditq.quant.calibration.calibrator import Calibrator
from viditq.quant.calibration.statistics import CalibrationStats
from viditq.quant.diagnosis import error_sums
from viditq.quant.diagnosis import observed as observed_diagnosis
from viditq.quant.diagnosis.diagnosis import Diagnosis
from viditq.quant.diagnosis.observed import ObservedDiagnosis
from viditq.stages.external import skipped
from viditq.stages.incoherence import has_incoherence, quantized_weights, write_incoherence


def diagnose(job: Job) -> str:
    """Measure the errors on a few evaluation prompts, each process its share; writes errors.json.

    Without calibration statistics also incoherence.json.
    """
    if why := skipped(job, "diagnose"):
        return why
    path, count = job.run_dir.errors, min(job.experiment.diagnosis_prompts, job.num_prompts)
    if not count or not job.experiment.plan.layers:
        return "switched off (diagnosis.num_prompts=0)" if not count else "not needed: nothing is quantized"
    if job.processes.first_does(lambda: is_whole(path)) and (job.needs_stats or has_incoherence(job)):
        return f"already done ({path})"
    merge = error_sums.merge_states if job.needs_stats else observed_diagnosis.merge_states
    with job.timed(job.run_dir.path, "diagnose"):
        worst = _diagnose(job, Partials(job.run_dir.path, merge), count)
    return f"{count} prompt{'s' * (count != 1)}, worst layer {worst} ({path})"


def _diagnose(job: Job, partials: Partials, count: int) -> str:
    e, processes = job.experiment, job.processes
    done = processes.first_does(partials.compact)
    batches = [b for b in enumerate(batches_of(count, e.adapter.calibration_batch_size)) if b[0] not in done]
    pipeline = job.load_float()
    quantized: Any = job.load_quantized()
    denoiser, other = (e.adapter.denoiser_of(p) for p in (pipeline, quantized))
    weights = quantized_weights(job, denoiser)  # held on to: offloading replaces those of the layers
    diagnosis = Diagnosis(denoiser, other, job.plan, e.adapter.timestep_scale, e.num_buckets)
    accumulator: Any = diagnosis
    if not job.needs_stats:
        sizes = (e.num_buckets, e.rows_per_bucket)
        accumulator = ObservedDiagnosis(
            diagnosis, Calibrator(denoiser, list(job.plan.layers), e.adapter.timestep_scale, *sizes)
        )
    kind = Diagnosing if job.needs_stats else ObservedDiagnosing
    arguments = (e.adapter, pipeline, job.load_embeds(e.data.prompts), e.seed)
    module = kind(*arguments, accumulator=accumulator, quantized=other, partials=partials, rank=processes.rank)
    run_batches(e.make_trainer(), module, processes.share(batches))
    processes.wait()
    return processes.first_does(lambda: _write(job, diagnosis, partials, weights))


def _write(job: Job, diagnosis: Diagnosis, partials: Partials, weights: dict[str, Tensor]) -> str:
    sums, inputs = observed_diagnosis.separated(partials.gathered().state)
    diagnosis.load_state(sums)
    errors = diagnosis.to_json(job.experiment.roles)
    if inputs:
        stats = CalibrationStats.from_tensors(inputs)
        write_incoherence(job, weights, stats, "diagnose", errors["num_prompts"])
    write_json(job.run_dir.errors, errors)
    partials.remove()
    totals = {name: layer["total"] for name, layer in errors["layers"].items() if layer["total"] is not None}
    name = max(totals, key=lambda name: totals[name])
    return f"{name} {100 * totals[name]:.1f} %"
