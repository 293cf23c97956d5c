"""Generation and calibration as Lightning `predict` loops over batches of prompt indices."""

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from viditq.errors import UserError
from viditq.files import write_tensors
from viditq.models.adapter import ModelAdapter
from viditq.models.generate import denoise, generate
from viditq.models.text import PromptEmbeds
from viditq.quant.calibration import Calibrator

LoadEmbeds = Callable[[int], PromptEmbeds]


def batches_of(count: int, batch_size: int) -> list[list[int]]:
    """Indices 0..count-1 in batches that do not depend on what is done already, so that a resumed run repeats them."""
    return [list(range(i, min(i + batch_size, count))) for i in range(0, count, batch_size)]


class PipelineModule(L.LightningModule):
    """A diffusers pipeline that Lightning can move to its device."""

    def __init__(self, adapter: ModelAdapter, pipeline: Any, load_embeds: LoadEmbeds, seed: int) -> None:
        super().__init__()
        self.adapter, self.pipeline, self.load_embeds, self.seed = adapter, pipeline, load_embeds, seed
        parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        self.parts = nn.ModuleDict(parts)

    def on_predict_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Stop at SIGTERM: Lightning only takes note of it, and heeds it in training alone."""
        if self.trainer.received_sigterm:
            raise SystemExit(128 + signal.SIGTERM)


class Generation(PipelineModule):
    """Generates the prompts of each batch and hands every sample to `sink(index, clip_FCHW uint8)`."""

    def __init__(self, *args: Any, sink: Callable[[int, Tensor], None]) -> None:
        super().__init__(*args)
        self.sink = sink

    def predict_step(self, indices: list[int], batch_idx: int) -> None:
        """One batch through the pipeline's own sampling loop."""
        embeds = [self.load_embeds(i) for i in indices]
        clips = generate(self.adapter, self.pipeline, embeds, indices, self.seed)
        for index, clip in zip(indices, clips, strict=True):
            self.sink(index, clip)


class Calibration(PipelineModule):
    """Samples with observers attached; after each batch the state so far is on disk."""

    def __init__(self, *args: Any, calibrator: Calibrator, partial: Path, num_done: int) -> None:
        super().__init__(*args)
        self.calibrator, self.partial, self.num_done = calibrator, partial, num_done

    def predict_step(self, indices: list[int], batch_idx: int) -> None:
        """One batch of calibration prompts; noise indices are kept apart from those of the evaluation."""
        seeds = [CALIBRATION_OFFSET + i for i in indices]
        self.calibrator.set_sample_seeds(seeds)
        with self.calibrator:
            denoise(self.adapter, self.pipeline, [self.load_embeds(i) for i in indices], seeds, self.seed)
        self.num_done += 1
        write_tensors(self.partial, self.calibrator.state(), {"num_done": str(self.num_done)})


CALIBRATION_OFFSET = 1_000_000


class _Batches(Dataset[list[int]]):
    def __init__(self, batches: Sequence[list[int]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> list[int]:
        return self.batches[number]


def run_batches(trainer: L.Trainer, module: L.LightningModule, batches: Sequence[list[int]]) -> None:
    """`trainer.predict` over lists of indices."""
    loader = DataLoader(_Batches(batches), batch_size=None, collate_fn=lambda batch: batch)
    trainer.predict(module, loader, return_predictions=False)


def load_partial(path: Path) -> tuple[int, dict[str, Tensor]]:
    """Number of finished batches and the observers' state of an interrupted calibration."""
    try:
        with safe_open(path, "pt") as file:
            num_done = int(file.metadata()["num_done"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}). Delete it: calibration then starts anew.") from error
    return num_done, load_file(path)
