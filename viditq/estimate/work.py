"""What each stage computes: samples, forwards of the denoiser, seconds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from viditq.data.samples import missing_samples
from viditq.engine.sampling import batches_of
from viditq.engine.timing import MIN_ROUNDS, rounds_within
from viditq.estimate.parts import TextShapes
from viditq.estimate.probe import Probe
from viditq.files import is_whole
from viditq.job import Job
from viditq.models.stored_embeds import are_stored
from viditq.stages.benchmark import HALF, WARM_UPS

DONE = "nothing left to do"
LEFT_OUT = "left out: too slow for benchmark.max_seconds"


@dataclass(frozen=True)
class Work:
    """samples: sampled (in whole batches); kept: files they leave in the end, with those there already. forwards: of
    float and quantized denoisers together. seconds: None = not told."""

    samples: int = 0
    kept: int = 0
    forwards: int = 0
    seconds: float | None = None
    note: str = ""


class Counter:
    """Samples, forwards and seconds of batches, from what was seen of one batch of the float or the quantized model."""

    def __init__(self, job: Job, texts: TextShapes, load_seconds: float) -> None:
        self.job, self.texts, self.load_seconds = job, texts, load_seconds
        self.size, self.count = job.experiment.batch_size, job.num_prompts

    def missing(self, folder: Path, count: int) -> list[list[int]]:
        """The batches that a stage will go through, as `stages.samples` cuts them."""
        gone = set(missing_samples(folder, count, self.job.experiment.adapter.sample_kind, renew=False))
        return [batch for batch in batches_of(self.count, self.size) if gone & set(batch)]

    def work(
        self, seen: Probe, prompts: list[str], batches: list[list[int]], kept: int = 0, decode: bool = True
    ) -> Work:
        """Of `batches` of indices into `prompts`; kept: files in the end."""
        samples = sum(map(len, batches))
        calls = sum(self.texts.calls([prompts[i] for i in batch]) for batch in batches)
        seconds = None
        if seen.forward_seconds is not None and seen.decode_seconds is not None:
            each = seen.forwards * seen.forward_seconds + (seen.decode_seconds if decode else 0.0)
            seconds = each * samples / seen.batch_size + (self.load_seconds if batches else 0.0)
        return Work(samples, kept, calls * seen.forwards, seconds, "" if batches else DONE)


def work_of(
    job: Job,
    texts: TextShapes,
    seen: Probe,
    quantized: Probe | None,
    once: tuple[float, float | None],
    passes: int = 1,
) -> dict[str, Work]:
    """Stage -> its work, of the configured stages (a search is left to `searching`).

    once: seconds to load the pipeline, and to quantize its weights. passes: over the calibration prompts, still to do.
    """
    e, count, counter = job.experiment, job.num_prompts, Counter(job, texts, once[0])
    prompts = e.data.prompts
    later = quantized or seen
    floors = [batch for entry in job.floors.values() for batch in counter.missing(entry.path, job.floor_size)]
    diagnosed = 0 if is_whole(job.run_dir.errors) or not e.plan.layers else min(e.diagnosis_prompts, count)
    batches = batches_of(diagnosed, e.adapter.calibration_batch_size)
    works = {
        "prompts": _encoding(job),
        "reference": counter.work(seen, prompts, counter.missing(job.reference.path, count), count),
        "noise_floor": counter.work(seen, prompts, floors, len(job.floors) * job.floor_size),
        "calibrate": _observing(counter, seen, passes),
        "search": Work(note=DONE),
        "quantize": _quantizing(job, counter, seen, later, once),
        "generate": counter.work(later, prompts, counter.missing(job.run_dir.samples, count), count),
        "diagnose": _both(
            counter.work(seen, prompts, batches, decode=False), counter.work(later, prompts, batches, decode=False)
        ),
        "benchmark": _timing(job, counter, seen, later),
    }
    return {stage: works.get(stage, Work(note="not estimated")) for stage in e.stages}


def _observing(counter: Counter, seen: Probe, passes: int) -> Work:
    e = counter.job.experiment
    prompts = e.observed_prompts
    batches = batches_of(len(prompts), e.adapter.calibration_batch_size) * passes
    work = counter.work(seen, prompts, batches, decode=False)
    if passes < 2:
        return work
    seconds = None if work.seconds is None else work.seconds + (passes - 1) * counter.load_seconds
    return replace(work, seconds=seconds, note=f"in {passes} passes, by calibration.moment_bytes")


def _encoding(job: Job) -> Work:
    data = job.experiment.data
    left = [p for p in {*data.prompts, *data.calibration_prompts} if not are_stored(job.embeds_path(p))]
    return Work(note=f"{len(left)} to encode" if left else DONE)


def _quantizing(job: Job, counter: Counter, seen: Probe, quantized: Probe, once: tuple[float, float | None]) -> Work:
    """With a correction also the float and the quantized denoiser side by side on the calibration prompts."""
    e, alone = job.experiment, _total(once)
    if job.run_dir.artifact.is_dir():
        return Work(seconds=0.0, note=DONE)
    if e.quant.correction is None:
        return Work(seconds=alone)
    prompts = e.data.calibration_prompts
    batches = batches_of(len(prompts), e.adapter.calibration_batch_size)
    exact, other = (counter.work(probe, prompts, batches, decode=False) for probe in (seen, quantized))
    seconds = None
    if alone is not None and exact.seconds is not None and other.seconds is not None:
        seconds = alone + exact.seconds + other.seconds
    return Work(exact.samples, 0, exact.forwards + other.forwards, seconds, "and its correction")


def _timing(job: Job, counter: Counter, seen: Probe, quantized: Probe) -> Work:
    """At most: fewer rounds where they are slow, none where they would take too long."""
    e = job.experiment
    if is_whole(job.run_dir.speed):
        return Work(note=DONE)
    floats = 1 + (e.adapter.dtype != HALF)
    rounds, seconds = WARM_UPS + e.benchmark_rounds, None
    if seen.forward_seconds is not None and quantized.forward_seconds is not None:
        each, limit = floats * seen.forward_seconds + quantized.forward_seconds, e.benchmark_seconds
        if limit is not None and (WARM_UPS + MIN_ROUNDS) * each > limit:
            return Work(note=LEFT_OUT)
        rounds = WARM_UPS + rounds_within(None if limit is None else limit - WARM_UPS * each, each, e.benchmark_rounds)
        seconds = rounds * each + (floats + 1) * counter.load_seconds
    return Work(forwards=rounds * (floats + 1), seconds=seconds, note="at most" if seconds is None else "")


def _both(exact: Work, quantized: Work) -> Work:
    """The quantized denoiser runs twice beside the float one: as a whole, and layer by layer."""
    seconds = None
    if exact.seconds is not None and quantized.seconds is not None:
        seconds = exact.seconds + 2 * quantized.seconds
    return Work(exact.samples, 0, exact.forwards + quantized.forwards, seconds, exact.note)


def _total(once: tuple[float, float | None]) -> float | None:
    return None if once[1] is None else once[0] + once[1]
