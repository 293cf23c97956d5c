"""Stage `evaluate`: metrics over (sample, reference) pairs, and what the noise floor scores in the same metrics."""

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torchmetrics import Metric

from viditq.data.samples import missing_samples
from viditq.engine.evaluation import Pairs, Results, first_prompts, measure
from viditq.engine.sampling import batches_of
from viditq.errors import UserError
from viditq.files import is_whole, read_json, read_tensors, write_json, write_tensors
from viditq.job import Job
from viditq.metrics.comparison import kind_of
from viditq.metrics.once import keeping_first
from viditq.metrics.verdict import verdicts
from viditq.models.shown import as_shown
from viditq.prompt import conditions_of
from viditq.seconds import read_seconds
from viditq.stages.card import update_card
from viditq.stages.external import sizes_of
from viditq.stages.text_encoders import told
from viditq.summary import summarize

PAIRS_AT_ONCE = 16


def evaluate(job: Job) -> str:
    """Compare the pairs, each process its share; writes metrics.json and per_prompt.json.

    Noise floors are measured where they are there, or the run has the stage that makes them.
    """
    run_dir, processes = job.run_dir, job.processes
    floors_there = bool(job.floors) and processes.first_does(lambda: _floors_there(job))
    if processes.first_does(lambda: _is_done(job, floors_there)):
        update_card(job)
        return f"already done ({run_dir.metrics}){_without(job)}"
    if processes.first:
        run_dir.forget_evaluation()
    metrics = job.experiment.make_metrics()
    with job.timed(run_dir.path, "evaluate"), keeping_first(job.floor_size):
        results = _measured(job, metrics, run_dir.samples, job.num_prompts)
        whole = {name: metric for name, metric in metrics.items() if "per_sample" not in results[name]}
        shared = {name: first_prompts(r, job.floor_size) for name, r in results.items() if name not in whole}
        if whole and job.floor_size:
            shared |= _measured(job, whole, run_dir.samples, job.floor_size)
        fidelity = [name for name, result in results.items() if kind_of(result) == "fidelity"]
        floors = _floor_results(job, metrics, fidelity) if floors_there else {}
    if processes.first:
        labels = {
            name: {"label": m.name, "unit": m.unit, "higher_is_better": m.higher_is_better}
            for name, m in metrics.items()
        }
        _write(job, results, shared, floors, labels)
    processes.wait()
    update_card(job)
    return f"{len(results)} metrics ({run_dir.metrics}){_without(job)}"


def _floors_there(job: Job) -> bool:
    """Whether there are noise floors to measure, or the run should have made them."""
    kind = job.experiment.adapter.sample_kind
    gone = any(missing_samples(floor.path, job.floor_size, kind) for floor in job.floors.values())
    return "noise_floor" in job.experiment.stages or not gone


def _is_done(job: Job, floors_there: bool) -> bool:
    """Whether the pairs were compared, against the noise floors if those are there by now."""
    if not (is_whole(job.run_dir.metrics) and is_whole(job.run_dir.per_prompt)):
        return False
    return not floors_there or _floor_of(job) is not None


def _floor_of(job: Job) -> Any:
    """What metrics.json says of the noise floors; None where there were none."""
    return read_json(job.run_dir.metrics).get("noise_floor")


def _without(job: Job) -> str:
    missed = bool(job.floors) and _floor_of(job) is None
    return "; no noise floors, which the stage noise_floor makes" if missed else ""


def _measured(job: Job, metrics: Mapping[str, Metric], samples: Path, count: int) -> Results:
    """What each metric computes from the first `count` pairs of `samples` and the float reference."""
    e, kind = job.experiment, job.experiment.adapter.sample_kind
    for folder in (job.reference.path, samples):
        if gone := job.processes.first_does(partial(missing_samples, folder, count, kind)):
            raise UserError(f"{len(gone)} samples are missing in {folder}. Run the stages before evaluate too.")
    batches = job.processes.share(batches_of(count, PAIRS_AT_ONCE))
    read = any(getattr(metric, "reads_given", False) for metric in metrics.values())  # metrics of others have no mark
    given = _given(job, [i for batch in batches for i in batch]) if read else None
    heard = e.adapter.makes_sound and any(getattr(metric, "reads_sound", False) for metric in metrics.values())
    pairs = Pairs(samples, job.reference.path, e.data, kind, batches, given, heard)
    return measure(e.make_trainer(), metrics, pairs)


def _given(job: Job, indices: list[int]) -> dict[int, Tensor] | None:
    """Prompt -> the picture that sampling started from; None where prompts come with none."""
    e = job.experiment
    if not all("image" in conditions_of(prompt) for prompt in e.data.prompts):
        return None
    return dict(zip(indices, as_shown(e.adapter, [e.data.prompts[i] for i in indices]), strict=True))


def _floor_results(job: Job, metrics: Mapping[str, Metric], fidelity: Collection[str]) -> dict[str, Results]:
    """Floor -> results on its prompts, from the cache or measured now; of nudged latents `fidelity` metrics alone."""
    entry = job.floor_results
    file = entry.path / "results.safetensors"
    if not job.processes.first_does(lambda: is_whole(file)):
        with job.holding(entry):
            near = {name: metric for name, metric in metrics.items() if name in fidelity}
            measured = {
                name: _measured(job, near if name == "latents" else metrics, f.path, job.floor_size)
                for name, f in job.floors.items()
            }
            flat = {
                f"{f}/{m}/{k}": v for f, r in measured.items() for m, values in r.items() for k, v in values.items()
            }
            if job.processes.first:
                write_tensors(file, flat)
    floors: dict[str, Results] = {name: {} for name in job.floors}
    for key, value in read_tensors(file).items():
        floor, metric, field = key.split("/")
        floors[floor].setdefault(metric, {})[field] = value
    return floors


def _write(
    job: Job, results: Results, shared: Results, floors: Mapping[str, Results], labels: Mapping[str, Any]
) -> None:
    e, run_dir = job.experiment, job.run_dir
    summary = summarize(results, dict(labels))
    seconds = {**read_seconds(job.reference.path), **read_seconds(job.stats.path), **read_seconds(run_dir.path)}
    if not job.needs_stats:
        seconds.pop("calibrate", None)
    if floors:
        floors_took = (read_seconds(entry.path).get("reference", 0.0) for entry in job.floors.values())
        seconds["noise_floor"] = round(sum(floors_took), 2)
    per_prompt: dict[str, Any] = {"prompts": e.data.prompts, "reference": str(job.reference.path.resolve())}
    pictures = [{name: str(path) for name, path in conditions_of(prompt).items()} for prompt in e.data.prompts]
    per_prompt |= {"conditions": pictures} if any(pictures) else {}
    columns = {"metrics": summary.pop("per_prompt"), "differences": summary.pop("differences")}
    write_json(run_dir.per_prompt, per_prompt | columns)
    of_denoiser = sizes_of(job)
    floor = {"num_prompts": job.floor_size, "seed": e.floor_seed, "dtype": e.floor_dtype, "latents": e.floor_latents}
    write_json(
        run_dir.metrics,
        {
            **summary,
            "verdict": verdicts(results, shared, floors, labels),
            "noise_floor": floor if floors else None,
            "model": e.adapter.name,
            "experiment": e.name,
            "seed": e.seed,
            "backend": _executed(job),
            **of_denoiser,
            "text_encoder": told(job, of_denoiser),
            "prompts": job.num_prompts,
            "seconds": seconds,
            "fingerprint": run_dir.fingerprint,
        },
    )


def _executed(job: Job) -> dict[str, Any]:
    """The backend that was asked for and which computed how many Linears (None: samples of an earlier version)."""
    path = job.run_dir.executed
    found: dict[str, Any] = read_json(path) if is_whole(path) else {"requested": job.experiment.backend, "layers": None}
    return found
