"""Generation and calibration as Lightning `predict` loops over batches of prompt indices."""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from viditq.engine.capture import first_call
from viditq.engine.offload import OFFLOADS, offload_layers, offload_pipeline
from viditq.engine.partials import Partial, Partials
from viditq.engine.threads import follow_cores
from viditq.engine.trainer import heed_sigterm
from viditq.engine.workers import Made, SideBySide, ended_early
from viditq.errors import UserError
from viditq.memory import reusing
from viditq.models.adapter import ModelAdapter
from viditq.models.generate import denoise, generate_samples, group_by_shape
from viditq.models.text import PromptEmbeds
from viditq.quant.calibration.calibrator import Calibrator
from viditq.quant.calibration.moment_passes import MomentPass
from viditq.quant.correction.ptqd import CorrectionFit
from viditq.quant.diagnosis.diagnosis import Diagnosis
from viditq.quant.diagnosis.observed import ObservedDiagnosis
from viditq.quant.execution.linear import QuantLinear
from viditq.quant.reconstruction.collect import BlockInputs
from viditq.quant.reconstruction.joint_calibrator import JointCalibrator

SAVING_SHARE = 0.05  # states can be gigabytes
LoadEmbeds = Callable[[int], PromptEmbeds]


def batches_of(count: int, batch_size: int) -> list[list[int]]:
    """Indices 0..count-1 in batches that do not depend on what is done already, so that a resumed run repeats them."""
    return [list(range(i, min(i + batch_size, count))) for i in range(0, count, batch_size)]


class PipelineModule(L.LightningModule):
    """A diffusers pipeline that Lightning can move to its device."""

    def __init__(self, adapter: ModelAdapter, pipeline: Any, load_embeds: LoadEmbeds, seed: int) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # more processes than batches
        self.adapter, self.pipeline, self.load_embeds, self.seed = adapter, pipeline, load_embeds, seed
        parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        self.parts = nn.ModuleDict(parts)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """For Lightning: all of them, since each process has read its own; mapped tensors must not be written to."""
        return [name for name, _ in (*self.named_parameters(), *self.named_buffers())]

    def offload(self, offload: str, device: torch.device) -> None:
        """Leave the models on the CPU but while they compute; Lightning no longer moves them."""
        self.parts = nn.ModuleDict()
        offload_pipeline(self.pipeline, offload, device)

    def let_go(self) -> None:
        """Drop the models: Lightning's modules and trainers lie in a ring, in which they would stay beside the next."""
        self.pipeline, self.parts = None, nn.ModuleDict()

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Stop at SIGTERM; share the cores anew."""
        follow_cores()
        heed_sigterm(self.trainer)


class Generation(PipelineModule):
    """Generates the prompts of each batch and hands every sample to `sink(index, clip_FCHW uint8)`, where it lies; that
    of a model that makes sound with it, `sink(index, clip, sound_AT int16)`.

    nudge: standard deviation of noise that is added to the latents after the first step.
    """

    def __init__(self, *args: Any, sink: Callable[..., None], nudge: float = 0.0) -> None:
        super().__init__(*args)
        self.sink, self.nudge = sink, nudge

    def make(self, indices: list[int]) -> list[tuple[Tensor, ...]]:
        """One batch through the pipeline's own sampling loop; a tuple a prompt, as `sink` takes it."""
        embeds = [self.load_embeds(i) for i in indices]
        made = generate_samples(self.adapter, self.pipeline, embeds, indices, self.seed, self.nudge)
        return list(zip(*(one for one in made if one is not None), strict=True))

    def predict_step(self, batch: list[int] | Made, batch_idx: int) -> None:
        """One batch to `sink`, made here unless another process has."""
        made = batch if isinstance(batch, Made) else Made(batch, self.make(batch))
        for index, sample in zip(made.indices, made.samples, strict=True):
            self.sink(index, *sample)

    def warm_up(self, indices: list[int]) -> None:
        """One call of the denoiser, if it is quantized: what a first call finds out and tells, copies then know."""
        denoiser = self.adapter.denoiser_of(self.pipeline)
        if any(isinstance(module, QuantLinear) for module in denoiser.modules()):
            embeds = [self.load_embeds(i) for i in indices]
            first_call(self.adapter, self.pipeline, embeds, indices, self.seed).on(denoiser)


class Accumulation(PipelineModule):
    """Samples while `accumulator` sums things up. Batches carry their number.

    The state is saved after the first batch, then so often that saving takes at most SAVING_SHARE of the time: a kill
    loses no more than 20 times what a save takes.
    """

    def __init__(
        self,
        *args: Any,
        accumulator: Calibrator
        | MomentPass
        | BlockInputs
        | JointCalibrator
        | Diagnosis
        | ObservedDiagnosis
        | CorrectionFit,
        partials: Partials,
        rank: int,
    ) -> None:
        super().__init__(*args)
        self.accumulator, self.partials, self.rank = accumulator, partials, rank
        before = partials.load(rank)
        self.done = before.done
        self._unsaved, self._next_save = False, 0.0
        if before.state:
            try:
                accumulator.load_state(before.state)
            except UserError as error:
                raise UserError(f"{error}. Delete {partials.path(rank)} and run the command again.") from error

    def predict_step(self, batch: tuple[int, list[int]], batch_idx: int) -> None:
        """One batch through the sampling loop, without decoding."""
        number, indices = batch
        embeds = [self.load_embeds(i) for i in indices]
        for group in group_by_shape(self.adapter, embeds):  # the accumulator must know which prompts it sees at once
            seeds = self.noise_indices([indices[i] for i in group])
            with self.accumulator:
                denoise(self.adapter, self.pipeline, [embeds[i] for i in group], seeds, self.seed)
        self.done |= {number}
        self._unsaved = True
        if time.monotonic() >= self._next_save:
            self._save()

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """What has been done is saved before SIGTERM ends the run."""
        if self.trainer.received_sigterm:
            self._save()
        super().on_predict_batch_start(batch, batch_idx, dataloader_idx)

    def on_predict_end(self) -> None:
        """The end, too, is saved."""
        self._save()

    def _save(self) -> None:
        if self._unsaved:
            start = time.monotonic()
            self.partials.save(self.rank, Partial(self.done, self.accumulator.state()))
            end = time.monotonic()
            self._next_save, self._unsaved = end + (end - start) / SAVING_SHARE, False

    def noise_indices(self, indices: list[int]) -> list[int]:
        """Tell the accumulator which prompts come, to be sampled at once; returns what their noise is drawn by."""
        raise NotImplementedError


class Calibration(Accumulation):
    """Observers on the float model; noise indices are kept apart from those of the evaluation."""

    accumulator: Calibrator | MomentPass | BlockInputs | JointCalibrator

    def noise_indices(self, indices: list[int]) -> list[int]:
        """Also the seeds of the reservoir's choice."""
        seeds = [CALIBRATION_OFFSET + i for i in indices]
        self.accumulator.set_sample_seeds(seeds)
        return seeds


class Diagnosing(Accumulation):
    """The quantized denoiser beside the float one, on evaluation prompts and their noise."""

    accumulator: Any

    def __init__(self, *args: Any, quantized: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.quantized: nn.Module | None = quantized  # moved to the device with this module

    def offload(self, offload: str, device: torch.device) -> None:
        """Of the quantized denoiser always layer by layer: its layers are also called outside it."""
        super().offload(offload, device)
        if self.quantized is not None:
            offload_layers(self.quantized, device)
        self.quantized = None

    def noise_indices(self, indices: list[int]) -> list[int]:
        """Those of the evaluation."""
        self.accumulator.add_prompts(len(indices))
        return indices


class ObservedDiagnosing(Diagnosing):
    """The same with observers on the float denoiser."""

    def noise_indices(self, indices: list[int]) -> list[int]:
        """Those of the evaluation, which are also the seeds of the reservoir's choice."""
        self.accumulator.set_sample_seeds(indices)
        return super().noise_indices(indices)


class Correcting(Diagnosing):
    """The same for the fit of a correction, on calibration prompts and their noise."""

    def noise_indices(self, indices: list[int]) -> list[int]:
        """Those of the calibration."""
        return [CALIBRATION_OFFSET + i for i in indices]


CALIBRATION_OFFSET = 1_000_000


class _Batches(Dataset[Any]):
    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Any:
        return self.batches[number]


def run_batches(trainer: L.Trainer, module: PipelineModule, batches: Sequence[Any]) -> None:
    """`trainer.predict` over this process's batches (lists of indices); a process without any takes part, idle."""
    offload = getattr(trainer, "offload", None)
    if offload in OFFLOADS:
        module.offload(offload, trainer.strategy.root_device)
    loader = DataLoader(_Batches(batches), batch_size=None, collate_fn=lambda batch: batch)
    with reusing():
        trainer.predict(module, loader, return_predictions=False)
    heed_sigterm(trainer)
    module.let_go()


def run_side_by_side(trainer: L.Trainer, module: Generation, batches: Sequence[list[int]], workers: int) -> None:
    """The same of batches that so many processes make (`SideBySide`); samples reach the sink in order, and here."""
    module.warm_up(batches[0])
    side_by_side = SideBySide(batches, module.make, workers)
    try:
        with reusing(), closing(side_by_side):
            trainer.predict(module, side_by_side, return_predictions=False)
    except RuntimeError as error:
        heed_sigterm(trainer)  # which may have been told to them, too
        if told := ended_early(error):
            raise told from error
        raise
    heed_sigterm(trainer)
    module.let_go()
