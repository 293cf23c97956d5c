"""One run's experiment, folders and processes: what every stage is handed."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from viditq.engine.offload import DISK
from viditq.engine.processes import Processes
from viditq.errors import UserError
from viditq.experiment import Experiment
from viditq.external.policy import ExternalQuantization
from viditq.files import damaged_files, is_whole, lock, remove_temporary, unfinished, write_json
from viditq.loading import in_dtype, load_artifact
from viditq.memory import give_back
from viditq.models.mapped_weights import load_from_disk
from viditq.models.stored_embeds import read_embeds
from viditq.models.text import PromptEmbeds
from viditq.models.text_encoders import load_text_from_disk
from viditq.quant.artifact import broken_file
from viditq.quant.calibration.row_sample import MOMENT_ROWS, MOMENT_SHARE
from viditq.quant.calibration.statistics import STATS_LAYOUT
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.policy import StoredArtifact
from viditq.quant.reconstruction.slots import LAYOUT
from viditq.quant.search.policy import SensitivitySearch
from viditq.run_dir import Entry, RunDir, fingerprint, timed

# What of the model a cached output depends on: its weights (by content), not where they lie or how Linears are grouped.
NOT_SAMPLING = (
    *("name", "path", "revision", "denoiser_path", "denoiser_revision", "fps"),
    *("roles", "keep_float", "guess", "float_denoisers"),
    "calibration_batch_size",  # a key of its own, where it counts
)
UNLESS_GIVEN = ("scheduler", "scheduler_settings", "variant")  # younger than what caches hold
OF_TEXT = (
    *("pipeline", "dtype", "component_dtypes", "conditioning", "negative_prompt"),
    *("encode", "encode_outputs", "max_tokens", "prompt_tokenizer", "variant"),
)


@dataclass
class Job:
    """`say` prints a line for the user (on the first process)."""

    experiment: Experiment
    run_dir: RunDir
    processes: Processes = field(default_factory=Processes)
    say: Callable[[str], None] = print
    _float_pipeline: Any = None

    # Where things are ------------------------------------------------------------------------------------------------

    @cached_property
    def _base_key(self) -> dict[str, Any]:
        values = self.experiment.adapter.to_dict()
        model = {k: v for k, v in values.items() if k not in NOT_SAMPLING and not (k in UNLESS_GIVEN and not v)}
        return {"model": model, "weights": self.experiment.weights}

    def _entry(self, kind: str, key: Mapping[str, Any]) -> Entry:
        return Entry(self.experiment.cache_dir / kind, key)

    @cached_property
    def embeds(self) -> Entry:
        """Embeddings of prompts."""
        model = {k: v for k, v in self._base_key["model"].items() if k in OF_TEXT}
        return self._entry("prompts", {"model": model, "weights": self.experiment.weights})

    @cached_property
    def quantized_embeds(self) -> Entry:
        """Embeddings of prompts by the text encoders that this run samples with: quantized ones, where it has them."""
        plans = {name: fingerprint({"json": plan.to_json()}) for name, plan in self.experiment.encoder_plans.items()}
        return self._entry("prompts", {**self.embeds.key, "text_encoders": plans}) if plans else self.embeds

    @cached_property
    def reference(self) -> Entry:
        """The float model's samples of the evaluation prompts."""
        return self.float_samples(self.experiment.seed, None)

    def float_samples(self, seed: int, denoiser_dtype: str | None) -> Entry:
        """The same from another seed, or with the denoiser in another dtype (None = the model's own)."""
        key = {**self._base_key, "seed": seed, "prompts": self.experiment.data.prompts}
        key |= {"denoiser_dtype": denoiser_dtype} if denoiser_dtype else {}
        return self._entry("reference", key | ({"compile": True} if self.experiment.adapter.compile else {}))

    @cached_property
    def stats(self) -> Entry:
        """Calibration statistics."""
        e = self.experiment
        rows = {"share": MOMENT_SHARE, "of_each": MOMENT_ROWS}
        moments = {"moment_layers": e.plan.moment_layers, "moment_rows": rows} if e.plan.moment_layers else {}
        key = {"rows_per_bucket": e.rows_per_bucket, "layout": STATS_LAYOUT}
        return self._entry("stats", {**self._calibration_key, **key, **moments})

    @cached_property
    def block_inputs(self) -> Entry:
        """Inputs of blocks, of a plan that learns roundings block by block."""
        e = self.experiment
        key = {"blocks": [*e.plan.learned_blocks], "block_input_bytes": e.block_input_bytes, "layout": LAYOUT}
        return self._entry("block_inputs", {**self._calibration_key, **key})

    @property
    def _calibration_key(self) -> dict[str, Any]:
        e = self.experiment
        prompts = {"calibration_prompts": e.data.calibration_prompts, "batch_size": e.adapter.calibration_batch_size}
        return {**self._base_key, "seed": e.seed, **prompts, "num_buckets": e.num_buckets}

    @property
    def searches(self) -> bool:
        """Whether the plan is found during the run."""
        return isinstance(self.experiment.quant.policy, SensitivitySearch)

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

    @property
    def num_prompts(self) -> int:
        """Number of evaluation prompts."""
        return len(self.experiment.data.prompts)

    @property
    def floor_size(self) -> int:
        """Number of prompts of the noise floor."""
        return self.experiment.floor_size

    @cached_property
    def floors(self) -> dict[str, Entry]:
        """Samples that differ from the reference as the float model does by itself: by seed, by bfloat16."""
        e = self.experiment
        if not self.floor_size:
            return {}
        samples = self.float_samples
        return {"seed": samples(e.floor_seed, None), "bfloat16": samples(e.seed, e.floor_dtype)}

    @property
    def stats_file(self) -> Path:
        return self.stats.path / "stats.safetensors"

    @cached_property
    def floor_results(self) -> Entry:
        """What the metrics say of the noise floor's samples, set against the reference."""
        keys = {name: entry.path.name for name, entry in self.floors.items()}
        inputs = {"reference": self.reference.path.name, "floors": keys, "num_prompts": self.floor_size}
        return self._entry("noise_floor", {**inputs, "metrics": self.experiment.tracked["metric"]})

    def embeds_path(self, prompt: str, entry: Entry | None = None) -> Path:
        """The cached embeddings of one prompt; entry: of the float encoder (None) or `quantized_embeds`."""
        return (entry or self.embeds).path / f"{fingerprint({'prompt': prompt})}.safetensors"

    def load_embeds(self, prompts: list[str], entry: Entry | None = None) -> Callable[[int], PromptEmbeds]:
        """Index of a prompt -> its embeddings; entry: as of `embeds_path`."""
        remedy = "Delete it and run the command again, with the stage prompts."

        def load(index: int) -> PromptEmbeds:
            file = self.embeds_path(prompts[index], entry)
            if not file.is_file():
                raise UserError(f"{prompts[index][:60]!r} is not encoded ({file}). Run the stage prompts before.")
            return read_embeds(file, remedy)

        return load

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
        on_cpu = e.offload is None and e.make_trainer().strategy.root_device.type == "cpu"
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
        return load_artifact(folder or self.artifact, backend=e.backend, complete=False, memory_budget=budget)

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
        """Record the seconds of the enclosed work, once."""
        if not self.processes.first:
            yield
            return
        with timed(folder, stage):
            yield

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
