"""Stages `reference`, `noise_floor` and `generate`: samples of the evaluation prompts, each in a file of its own."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from viditq.data.samples import adopt_samples, missing_samples, sample_path, save_sample, save_sound, sound_path
from viditq.engine.sampling import Generation, batches_of, run_batches, run_side_by_side
from viditq.engine.writing import SampleWriter, waiting_samples
from viditq.files import write_json
from viditq.job import Job
from viditq.models.compiling import compile_forward
from viditq.models.sound import sampling_rate
from viditq.quant.calibration.context import denoisers_of
from viditq.quant.sizes import held_bytes
from viditq.run_dir import Entry
from viditq.stages.external import load_judged
from viditq.stages.text_encoders import encode


def reference(job: Job) -> str:
    """Generate the evaluation prompts with the float model."""
    return _float_samples(job, job.reference, job.experiment.seed, None, 0.0, "float", job.num_prompts)


def noise_floor(job: Job) -> str:
    """Some of them by the float model again: with another seed, in another dtype, with next to no noise on latents."""
    if not job.floor_size:
        return "switched off (noise_floor.num_prompts=0)"
    e = job.experiment
    ways: dict[str, tuple[int, str | None, float, str]] = {
        "seed": (e.floor_seed, None, 0.0, f"float seed {e.floor_seed}"),
        "bfloat16": (e.seed, e.floor_dtype, 0.0, f"float {e.floor_dtype}"),
        "latents": (e.seed, None, e.floor_latents, f"float latents + {e.floor_latents:g}"),
    }
    return "; ".join(
        _float_samples(job, entry, *ways[name], count=job.floor_size) for name, entry in job.floors.items()
    )


def generate(job: Job) -> str:
    """Load what is judged, the artifact or what another library quantizes; the same prompts from the same noise."""
    folder, e = job.run_dir.samples, job.experiment
    encode(job)

    def load() -> Any:
        job.let_go_of_float()
        pipeline, executed = load_judged(job)
        if job.processes.first:
            write_json(job.run_dir.executed, executed)
        return pipeline

    timed = job.timed(job.run_dir.path, "generate")
    return _generate(job, folder, job.num_prompts, "quantized", load, e.seed, timed, job.quantized_embeds)


def missing(job: Job, folder: Path, count: int) -> list[int]:
    """Indices of the prompts whose sample `folder` lacks, or holds otherwise than it was written."""
    kind = job.experiment.adapter.sample_kind
    if adopted := adopt_samples(folder, count, kind):
        job.say(f"      {adopted} samples without checksums are taken as they are ({folder})")
    return missing_samples(folder, count, kind)


def _float_samples(job: Job, entry: Entry, seed: int, dtype: str | None, nudge: float, what: str, count: int) -> str:
    if not job.processes.first_does(lambda: missing(job, entry.path, count)):
        job.sweep_up(entry)
        return f"all {count} {what} samples already there ({entry.path})"

    def load() -> Any:
        return job.load_float(dtype)

    with job.holding(entry):
        return _generate(job, entry.path, count, what, load, seed, job.timed(entry.path, "reference"), nudge=nudge)


def _generate(
    job: Job,
    folder: Path,
    count: int,
    what: str,
    load: Callable[[], Any],
    seed: int,
    timed: AbstractContextManager[None],
    embeds: Entry | None = None,
    nudge: float = 0.0,
) -> str:
    """Make the samples that `folder` lacks, each process its share of the batches. embeds: as of `Job.load_embeds`."""
    e, modality = job.experiment, job.experiment.adapter.modality
    wanted = set(job.processes.first_does(lambda: missing(job, folder, count)))
    if not wanted:
        return f"all {count} {what} samples already there ({folder})"
    if job.processes.first:
        job.run_dir.forget_evaluation()

    trainer = e.make_trainer()

    def save(index: int, clip: Tensor, sound: Tensor | None = None) -> None:
        if sound is not None:
            save_sound(sound_path(folder, index), sound, sampling_rate(pipeline))
        save_sample(sample_path(folder, index, modality), clip)  # last: where it is, the sample is whole

    def sink(index: int, *sample: Tensor) -> None:
        if index in wanted:
            writer.put(index, *sample)

    with timed:
        # Batches are cut from all prompts, whatever is missing, so that a resumed run repeats them to the bit.
        batches = [b for b in batches_of(job.num_prompts, e.batch_size) if wanted & set(b)]
        pipeline = load()
        denoiser = e.adapter.denoiser_of(pipeline)
        if e.adapter.compile:
            compile_forward(denoiser)
        read = job.load_embeds(e.data.prompts, embeds)
        module = Generation(e.adapter, pipeline, read, seed, sink=sink, nudge=nudge)
        with SampleWriter(save, waiting_samples(trainer, e.batch_size)) as writer:
            writer.watch(denoisers_of(denoiser).values())
            share = job.processes.share(batches)
            if workers := job.workers(trainer, held_bytes(denoiser), len(share)):
                run_side_by_side(trainer, module, share, workers)
            else:
                run_batches(trainer, module, share)
        job.processes.wait()
    return f"{len(wanted)} of {count} {what} samples generated ({folder})"
