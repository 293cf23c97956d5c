"""One run's experiment, folders and processes: what every stage is handed."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L

from viditq.cache_entries import CacheEntries
from viditq.engine.offload import DISK
from viditq.engine.processes import Processes
from viditq.engine.threads import counting_threads
from viditq.engine.workers import count_workers
from viditq.errors import UserError
from viditq.experiment import Experiment
from viditq.external.policy import ExternalQuantization
from viditq.files import damaged_files, is_whole, lock, remove_temporary, unfinished, write_json
from viditq.loading import in_dtype, load_artifact
from viditq.memory import give_back
from viditq.models.mapped_weights import load_from_disk
from viditq.models.text_encoders import load_text_from_disk
from viditq.provenance import computed_on
from viditq.quant.artifact import broken_file
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.policy import StoredArtifact
from viditq.quant.execution.attention import emulate_attention
from viditq.quant.search.policy import SensitivitySearch
from viditq.quant.search.treatment_policy import TreatmentSearch
from viditq.run_dir import Entry, RunDir
from viditq.seconds import timed


@dataclass
class Job(CacheEntries):
    """`say` prints a line for the user (on the first process)."""

    experiment: Experiment
    run_dir: RunDir
    processes: Processes = field(default_factory=Processes)
    say: Callable[[str], None] = print
    _float_pipeline: Any = None
    _side_by_side: int = 0  # processes that have made the samples of the stage that is timed

    # What is quantized, and how --------------------------------------------------------------------------------------

    @property
    def searches(self) -> bool:
        """Whether the plan is found during the run."""
        return isinstance(self.experiment.quant.policy, SensitivitySearch | TreatmentSearch)

    @property
    def stored_artifact(self) -> StoredArtifact | None:
        """The artifact that the run takes as it is; None = it makes one."""
        policy = self.experiment.quant.policy
        return policy if isinstance(policy, StoredArtifact) else None

    @property
    def external(self) -> ExternalQuantization | None:
        """Who else quantizes, while the denoiser is loaded; None = the run does."""
        policy = self.experiment.quant.policy
        return policy if isinstance(policy, ExternalQuantization) else None

    @property
    def plan(self) -> QuantPlan:
        """The plan of this run; raises UserError while it has not been found yet."""
        if not self.searches:
            return self.experiment.plan
        if not self.run_dir.plan.is_file():
            raise UserError(f"{self.run_dir.plan} is missing. Run the stage search before.")
        return QuantPlan.from_json(self.run_dir.plan.read_text())

    @property
    def artifact(self) -> Path:
        """The folder of the quantized model; raises UserError while there is none."""
        if not self.run_dir.artifact.is_dir():
            raise UserError(f"{self.run_dir.artifact} does not exist. Run the stage quantize before.")
        return self.run_dir.artifact

    @property
    def needs_stats(self) -> bool:
        """Whether calibration is part of this run: also where average bits depend on where the steps fall."""
        plan = self.experiment.plan
        return self.searches or (self.stored_artifact is None and (plan.needs_stats or plan.bits_vary))

    @property
    def needs_block_inputs(self) -> bool:
        """Whether inputs of blocks are kept while calibrating."""
        return self.stored_artifact is None and bool(self.experiment.plan.learned_blocks)

    # Models ----------------------------------------------------------------------------------------------------------

    def load_text(self) -> Any:
        """The pipeline with its tokenizers and float text encoders only; with trainer.offload=disk their weights, too,
        stay in their files."""
        adapter = self.experiment.adapter
        return load_text_from_disk(adapter) if self.experiment.offload == DISK else adapter.load_text_part()

    def load_float(self, denoiser_dtype: str | None = None) -> Any:
        """The float pipeline, without its text part; denoiser_dtype: that its denoisers compute in (None = their own).

        On a CPU stages that follow each other share one, until `let_go_of_float` or another dtype is asked for. With
        trainer.offload=disk its weights stay in their files.
        """
        e, held = self.experiment, self._float_pipeline
        if denoiser_dtype is None and held is not None:
            return held
        self.let_go_of_float()
        if e.offload == DISK:
            pipeline = load_from_disk(e.adapter, denoiser_dtype)
            return pipeline if denoiser_dtype is None else in_dtype(e.adapter, pipeline, denoiser_dtype, cast=False)
        pipeline = e.adapter.load()
        if denoiser_dtype is not None:
            return in_dtype(e.adapter, pipeline, denoiser_dtype)
        on_cpu = e.offload is None and e.device.type == "cpu"
        if on_cpu and not e.adapter.compile:  # elsewhere stages change it: its place, or its forward
            self._float_pipeline = pipeline
        return pipeline

    def let_go_of_float(self) -> None:
        """Before a stage that needs the memory and not the float model."""
        if self._float_pipeline is not None:
            self._float_pipeline = None
            give_back()  # now: the next one would be loaded beside it

    def load_quantized(self, folder: Path | None = None) -> Any:
        """The pipeline around the artifact in `folder` (None = the run's)."""
        e = self.experiment
        budget = e.memory_budget if e.offload == DISK else None
        pipeline = load_artifact(folder or self.artifact, backend=e.backend, complete=False, memory_budget=budget)
        if e.quant.attention is not None:
            emulate_attention(e.adapter.denoiser_of(pipeline), e.quant.attention, e.quant.attention_granularity)
        return pipeline

    def workers(self, trainer: L.Trainer, weights_bytes: int, num_batches: int) -> int:
        """How many processes make batches of samples side by side, 0 = none; weights_bytes: of the denoisers in memory.

        None for what may compute with threads of its own, which a forked process lacks: what torch.compile makes, and
        other libraries. Nor for weights that come and go.
        """
        e = self.experiment
        forks = e.offload is None and not e.adapter.compile and self.external is None
        self._side_by_side = count_workers(trainer, weights_bytes, num_batches) if forks else 0
        return self._side_by_side

    # Work that others may be doing too -------------------------------------------------------------------------------

    @contextmanager
    def holding(self, entry: Entry) -> Iterator[None]:
        """Let nobody else work on a cache entry; waits for another run that does, then finds its work done."""

        def on_wait() -> None:
            self.say(f"      waiting for another run that works on {entry.path}")

        if not self.processes.first:
            self.processes.wait()
            yield
            self.processes.wait()
            return
        with lock(entry.path, on_wait):
            self._tidy_entry(entry)
            self.processes.wait()
            yield
            self.processes.wait()

    @contextmanager
    def timed(self, folder: Path, stage: str) -> Iterator[None]:
        """Record the seconds of the enclosed work, and what they were measured on, once."""
        if not self.processes.first:
            yield
            return
        self._side_by_side = 0
        with counting_threads() as counts, timed(folder, stage, lambda: self._computed_on(counts)):
            yield

    def _computed_on(self, counts: set[int]) -> str:
        device = self.experiment.device
        if self._side_by_side:
            return computed_on({1}, self._side_by_side, device)
        return computed_on(counts, self.processes.count, device)

    def may_change(self) -> None:
        """Called by a stage that did nothing for a reason which may be gone the next time (`settled.py`)."""

    def sweep_up(self, entry: Entry, leftovers: str = "*.tmp") -> None:
        """Tidy a finished cache entry that a killed run left in disorder, unless another run is at it."""
        path = entry.path
        if self.processes.first and (unfinished(path) or damaged_files(path) or [*path.glob(leftovers)]):
            with suppress(Busy), lock(path, _busy):
                self._tidy_entry(entry)
                found = [*path.glob(leftovers)]
                for leftover in found:
                    leftover.unlink()
                for folder in {leftover.parent for leftover in found} - {path}:
                    with suppress(OSError):  # holds something else
                        folder.rmdir()

    def _tidy_entry(self, entry: Entry) -> None:
        self.tidy(entry.path)
        if not is_whole(entry.key_file):
            write_json(entry.key_file, entry.key)

    def tidy(self, folder: Path) -> None:
        """Remove what a kill left behind, and files that were cut off, so that they are made again."""
        remove_temporary(folder)
        for path in damaged_files(folder):
            self.say(f"      {path} is damaged and will be made again")
            path.unlink()

    def tidy_run(self) -> None:
        """The same for the folder of the run."""
        run = self.run_dir
        self.tidy(run.path)
        self.tidy(run.samples)
        broken = broken_file(run.artifact) if run.artifact.is_dir() else None
        if broken is not None:
            self.say(f"      {broken} is damaged and will be made again")
            shutil.rmtree(broken.parent)  # of one text encoder, if the file is its


class Busy(Exception):
    """Another run holds the lock."""


def _busy() -> None:
    raise Busy
