"""Which stages take what others make: a list without those, where it is not there already, is refused at the start."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from viditq.data.samples import missing_samples
from viditq.errors import UserError
from viditq.files import is_whole
from viditq.job import Job

NEEDED = {"generate": ("quantize",), "evaluate": ("reference", "generate"), "report": ("evaluate",)}
"""Stage -> those whose results it reads, of the ones that may take long."""


def check_order(job: Job) -> None:
    """Raises UserError for the first stage of the run that will not find what it reads."""
    for stage, needed in _missing(job):
        raise UserError(
            f"The stage {stage} takes what the stage {needed} makes, which is not there, and {needed} is not among "
            f"stages={list(job.experiment.stages)}. Run the stage {needed} before, or too."
        )


def _missing(job: Job) -> Iterator[tuple[str, str]]:
    stages = job.experiment.stages
    for stage in (stage for stage in stages if stage in NEEDED and not THERE[stage](job)):
        for needed in NEEDED[stage]:
            if needed not in stages and not THERE[needed](job):
                yield stage, needed


def _evaluated(job: Job) -> bool:
    return is_whole(job.run_dir.metrics) and is_whole(job.run_dir.per_prompt)


def _quantized(job: Job) -> bool:
    return job.external is not None or job.run_dir.artifact.is_dir()


def _sampled(job: Job) -> bool:
    return not missing_samples(job.run_dir.samples, job.num_prompts, job.experiment.adapter.sample_kind)


def _referenced(job: Job) -> bool:
    return not missing_samples(job.reference.path, job.num_prompts, job.experiment.adapter.sample_kind)


def _reported(job: Job) -> bool:
    return is_whole(job.run_dir.page)


THERE: dict[str, Callable[[Job], bool]] = {
    "quantize": _quantized,
    "generate": _sampled,
    "reference": _referenced,
    "evaluate": _evaluated,
    "report": _reported,
}
"""Stage -> whether what it makes is on disk."""
