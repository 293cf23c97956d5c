"""How long the stages of a run are likely to take: as long as before, or as their share of sampling says."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from viditq.data.samples import sample_files
from viditq.engine.progress import Forecast
from viditq.errors import UserError
from viditq.files import is_whole, read_json
from viditq.job import Job
from viditq.run_dir import read_seconds

LOOKED_AT = 20  # runs beside this one, the newest
DIAGNOSED = 2  # a prompt is sampled by the float model and by the quantized one


def forecast(job: Job) -> Forecast:
    """What is left to do of this run's stages, as the files tell that are there by now. What a stage has done already
    counts as nothing; of stages that do not sample, what they took in the newest run of the same name, model and
    number of prompts beside this one, or of another name.
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
    seconds = {stage: took for stage, took in before.items() if stage != "reference"}
    seconds |= {stage: 0.0 for stage, whole in done.items() if whole}
    return Forecast(_prompts(job, done), seconds, _per_prompt(job, before))


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


def _per_prompt(job: Job, before: Mapping[str, float]) -> float | None:
    """Seconds of a sample of the float model: this run's, else an earlier one's."""
    made = job.num_prompts - _missing(job, job.reference.path, job.num_prompts)
    took = _recorded(job.reference.path).get("reference")
    if took and made:
        return took / made
    return before["reference"] / job.num_prompts if "reference" in before else None


NOT_SAMPLING = ("prompts", "search", "quantize", "benchmark", "evaluate", "report")


def _seconds_before(job: Job) -> dict[str, float]:
    """Stage -> seconds, of NOT_SAMPLING and the reference."""
    e, mine = job.experiment, job.run_dir.path
    files = [file for file in mine.parent.glob("*/metrics.json") if file.parent.name != mine.name]
    newest = sorted(files, key=_time_of, reverse=True)[:LOOKED_AT]
    others = [(file.parent, found) for file in newest if (found := _metrics(file))]
    alike = [
        one for one in others if one[1].get("model") == e.adapter.name and one[1].get("prompts") == job.num_prompts
    ]
    alike.sort(key=lambda one: one[1].get("experiment") != e.name)
    for folder, metrics in alike[:1]:
        took = {**_recorded(folder), **metrics["seconds"]}
        return {stage: float(took[stage]) for stage in ("reference", *NOT_SAMPLING) if stage in took}
    return {}


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
