"""Which stages of a run have nothing left to do, by their own word, and the files that they say so by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from omegaconf import DictConfig

from viditq.files import LOCK
from viditq.finished import Doubt, write_finished
from viditq.job import Job
from viditq.models.adapter import ModelAdapter
from viditq.models.stored_embeds import files_of
from viditq.run_dir import Entry
from viditq.stages import FUNCTIONS


class Unsettled(Exception):
    """A stage has something left to do."""


def _unsettled() -> NoReturn:
    raise Unsettled


class SettledJob(Job):
    """A job of one process whose stages may look and say that they are done, but not begin with anything."""

    @contextmanager
    def holding(self, entry: Entry) -> Iterator[None]:
        """Raises Unsettled."""
        yield _unsettled()

    @contextmanager
    def timed(self, folder: Path, stage: str) -> Iterator[None]:
        """Raises Unsettled."""
        yield _unsettled()

    def may_change(self) -> None:
        """Raises Unsettled."""
        _unsettled()


def remember(cfg: DictConfig, job: Job, heading: Sequence[str], since: int) -> None:
    """Record that this run is finished (`finished.py`), if it is and will stay so; called once its stages are through.

    since: when the run began to read its files. No record where something is read that nobody here can look after
    (models of the hub, whose revision may move; classes of prompts or policies that do not say what they read), and
    where a file has changed since it was read.
    """
    e = job.experiment
    read = [getattr(part, "files", None) for part in (e.data, e.quant.policy)]
    if None in read or not isinstance(e.adapter, ModelAdapter) or e.adapter.of_hub:
        return
    settled = SettledJob(e, job.run_dir, say=lambda line: None)
    with suppress(Unsettled, Doubt, OSError):  # a disk that takes no record, or a file that just went
        lines = {stage: FUNCTIONS[stage](settled) for stage in e.stages}
        files = [file.absolute() for files in read for file in files or ()]
        left = [file.absolute() for file in files_in_cache(settled)]
        write_finished(cfg, job.run_dir, heading, lines, model_folders(e.adapter), files, left, since)


def model_folders(adapter: ModelAdapter) -> list[Path]:
    """The folders that the model is read from."""
    elsewhere = adapter.denoiser_names if adapter.denoiser_path is not None else []
    return [p.absolute() for p in (adapter.folder, *(adapter.part_folder(n, weights=False) for n in elsewhere))]


def files_in_cache(job: Job) -> Iterator[Path]:
    """What this run's stages have left for others too."""
    data = job.experiment.data
    paths = [job.embeds_path(prompt) for prompt in dict.fromkeys([*data.prompts, *data.calibration_prompts])]
    if job.quantized_embeds != job.embeds:
        paths += [job.embeds_path(prompt, job.quantized_embeds) for prompt in dict.fromkeys(data.prompts)]
    yield from dict.fromkeys(file for path in paths if path.is_file() for file in files_of(path))
    entries = [job.reference, *job.floors.values()]
    entries += [job.stats] if job.needs_stats else []
    entries += [job.block_inputs] if job.needs_block_inputs else []
    for entry in entries:
        yield from (p for p in entry.path.rglob("*") if p.is_file() and p.name != LOCK and p.suffix != ".tmp")
