"""README.md of an artifact, by the stages that know more of it: quantize, evaluate, report."""

from viditq import provenance
from viditq.card import artifact_card
from viditq.job import Job
from viditq.models.adapter import ModelAdapter


def update_card(job: Job) -> None:
    """Write it anew if it would say something else, on the first process. One that somebody has changed stays."""
    if isinstance(job.experiment.adapter, ModelAdapter) and job.external is None:
        job.processes.first_does(lambda: _update(job))


def _update(job: Job) -> None:
    card = artifact_card(job.run_dir.artifact, provenance.command(), job.experiment.adapter)
    if not card.is_ours:
        job.say(f"      {card.path} was changed by hand, and stays as it is")
    if not card.is_there():
        job.may_change()
        card.write()
