"""How long the stages of a run are likely to take: as in runs beside it, or as their share of sampling says."""

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from viditq.data.samples import sample_files
from viditq.engine.pace import Forecast
from viditq.errors import UserError
from viditq.files import is_whole, read_json
from viditq.job import Job
from viditq.seconds import plausible_seconds, read_seconds

LOOKED_AT = 20  # runs beside this one, the newest
BELIEVED = 5  # of those that are like this one: a single one may have shared its machine with others
DIAGNOSED = 2  # a prompt is sampled by the float model and by the quantized one


def forecast(job: Job) -> Forecast:
    """What is left to do of this run's stages, as the files tell that are there by now. What a stage has done already
    counts as nothing. The others are likely to take the median of what they took in the newest runs of this model and
    as many prompts beside this one; those that sample in float as long as the samples that they are like.
    """
    run, before = job.run_dir, _seconds_before(job)
    prompts = [*job.experiment.data.prompts, *job.experiment.data.calibration_prompts]
    done = {
        "prompts": all(job.embeds_path(prompt).is_file() for prompt in prompts),
        "search": run.plan.is_file(),
        "quantize": is_whole(run.artifact / "meta.json"),
        "diagnose": is_whole(run.errors),
        "benchmark": is_whole(run.speed),
        "evaluate": is_whole(run.metrics),
        "report": is_whole(run.page),
    }
    left = _prompts(job, done)
    seconds = {stage: took for stage, took in before.items() if stage != "reference"}
    if "generate" in seconds:
        seconds["generate"] *= left["generate"] / job.num_prompts
    seconds |= {stage: 0.0 for stage, whole in done.items() if whole}
    batch = job.experiment.batch_size * job.processes.count
    earlier = before["reference"] / job.num_prompts if "reference" in before else None
    return Forecast(left, seconds, _per_prompt(job) or earlier, earlier, batch)


def _prompts(job: Job, done: Mapping[str, bool]) -> dict[str, float]:
    """Stage -> samples that it still has to make, or the work of so many."""
    e, count = job.experiment, job.num_prompts
    floors = sum(_missing(job, entry.path, job.floor_size) for entry in job.floors.values())
    left: dict[str, float] = {"reference": _missing(job, job.reference.path, count), "noise_floor": floors}
    observed = 0 if not job.needs_stats or is_whole(job.stats_file) else len(e.observed_prompts)
    compared = min(e.diagnosis_prompts, count) if e.plan.layers or job.searches else 0
    left |= {"calibrate": observed, "generate": _missing(job, job.run_dir.samples, count)}
    return left | {"diagnose": 0 if done["diagnose"] else DIAGNOSED * compared}


def _missing(job: Job, folder: Path, count: int) -> int:
    samples = (sample_files(folder, index, job.experiment.adapter.sample_kind) for index in range(count))
    return sum(not all(path.is_file() for path in files) for files in samples)


def _per_prompt(job: Job) -> float | None:
    """Seconds of a sample of the float model, as of those that this run has or will make."""
    made = job.num_prompts - _missing(job, job.reference.path, job.num_prompts)
    took = _recorded(job.reference.path).get("reference")
    return took / made if took and made else None


NOT_SAMPLING = ("prompts", "search", "quantize", "benchmark", "evaluate", "report")
BY_RECIPE = ("search", "quantize", "generate")  # what they take hangs on the recipe, so that runs of the same name tell


def _seconds_before(job: Job) -> dict[str, float]:
    """Stage -> seconds, of NOT_SAMPLING, the reference and the quantized samples."""
    e, mine = job.experiment, job.run_dir.path
    files = [file for file in mine.parent.glob("*/metrics.json") if file.parent.name != mine.name]
    newest = sorted(files, key=_time_of, reverse=True)[:LOOKED_AT]
    others = [(found, file.parent) for file in newest if (found := _metrics(file))]
    alike = [
        ({**_recorded(folder), **plausible_seconds(found["seconds"])}, found.get("experiment") == e.name)
        for found, folder in others
        if found.get("model") == e.adapter.name and found.get("prompts") == job.num_prompts
    ]
    likely = {}
    for stage in ("reference", "generate", *NOT_SAMPLING):
        every = [float(took[stage]) for took, _ in alike if stage in took]
        same = [float(took[stage]) for took, named in alike if named and stage in took] if stage in BY_RECIPE else []
        if every:
            likely[stage] = median((same or every)[:BELIEVED])
    return likely


def _recorded(folder: Path) -> dict[str, float]:
    """Stage -> seconds; nothing where the file was cut off, which the stage that it is of mends."""
    return read_seconds(folder) if is_whole(folder / "seconds.json") else {}


def _time_of(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # gone by now
        return 0.0


def _metrics(file: Path) -> dict[str, Any] | None:
    """None where the file is damaged, or of something else: it is another run's."""
    try:
        found = read_json(file)
    except (UserError, OSError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("seconds"), dict) else None
