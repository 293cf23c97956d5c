"""Evaluation as a Lightning `test` loop over pairs of sample files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Metric

from viditq.data.prompts import PromptData
from viditq.data.samples import load_sample, sample_path, sound_path, sounds_alike
from viditq.engine.trainer import heed_sigterm
from viditq.memory import reusing
from viditq.metrics.batch import EvalBatch, Sound
from viditq.metrics.streaming import summarise

Results = dict[str, dict[str, Tensor]]


class Pairs(Dataset[EvalBatch | None]):
    """Batches of (sample, reference) pairs, with real clips where the data has them.

    given: prompt -> the picture that sampling started from. heard: with the sound of each. Without any batch it holds
    one that is None: a process with nothing to score must take part in the synchronisation.
    """

    def __init__(
        self,
        samples: Path,
        references: Path,
        data: PromptData,
        kind: str,
        batches: Sequence[list[int]],
        given: Mapping[int, Tensor] | None = None,
        heard: bool = False,
    ) -> None:
        self.samples, self.references, self.data = samples, references, data
        self.kind, self.batches, self.given, self.heard = kind, batches or [[]], given, heard

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> EvalBatch | None:
        indices = self.batches[number]
        if not indices:
            return None
        return EvalBatch(
            samples=self._load(self.samples, indices),
            references=self._load(self.references, indices),
            prompts=[self.data.prompts[i] for i in indices],
            index=torch.tensor(indices),
            data=self.data.real_clips(indices),
            given=None if self.given is None else [self.given[i] for i in indices],
            sound=self._sound(indices) if self.heard else None,
        )

    def _load(self, folder: Path, indices: list[int]) -> Tensor:
        return torch.stack([load_sample(sample_path(folder, i, self.kind)) for i in indices])

    def _sound(self, indices: list[int]) -> Sound:
        folders = (self.references, self.samples)
        sounds, rate = sounds_alike([sound_path(folder, i) for folder in folders for i in indices])
        references, samples = torch.stack(sounds).chunk(2)
        return Sound(samples, references, rate)


class Evaluation(L.LightningModule):
    """Feeds every metric; `results` holds what each computed, synchronised over processes."""

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        super().__init__()
        self.metrics = dict(metrics)
        self.registered = nn.ModuleDict(metrics)  # moved to the device with this module
        self.results: Results = {}

    def transfer_batch_to_device(
        self, batch: EvalBatch | None, device: torch.device, dataloader_idx: int
    ) -> EvalBatch | None:
        """Lightning does not move frozen dataclasses by itself."""
        return None if batch is None else batch.to(device)

    def test_step(self, batch: EvalBatch | None, batch_idx: int) -> None:
        """Update all metrics with one batch of pairs."""
        for metric in self.metrics.values() if batch is not None else ():
            metric.update(batch)

    def on_test_batch_end(self, outputs: object, batch: EvalBatch | None, batch_idx: int, number: int = 0) -> None:
        """Stop at SIGTERM, before Lightning's own loop does: with a status of success."""
        heed_sigterm(self.trainer)

    def on_test_epoch_end(self) -> None:
        """Compute (and thereby synchronise) all metrics."""
        self.results = {name: _columns(metric.compute()) for name, metric in self.metrics.items()}


def _columns(result: dict[str, Tensor]) -> dict[str, Tensor]:
    """In main memory, where those of the floors are read to; one value per prompt is [n]: torchmetrics makes a scalar
    of it where n = 1.
    """
    per_prompt = {k for k in result if k == "index" or k.startswith("per_sample")}
    return {k: v.cpu().reshape(-1) if k in per_prompt else v.cpu() for k, v in result.items()}


def measure(trainer: L.Trainer, metrics: Mapping[str, Metric], pairs: Pairs) -> Results:
    """Name -> what the metric computed (value, standard_error, per_sample ...) from these pairs alone."""
    for metric in metrics.values():
        metric.reset()
    module = Evaluation(metrics)
    with reusing():
        trainer.test(module, DataLoader(pairs, batch_size=None, collate_fn=lambda batch: batch), verbose=False)
    heed_sigterm(trainer)
    return module.results


def first_prompts(result: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """A per-sample metric's result restricted to the prompts 0 .. count - 1."""
    kept = result["index"] < count
    columns = {key: value[kept] for key, value in result.items() if key.startswith("per_sample")}
    return summarise(result["index"][kept], **columns) if bool(kept.any()) else {}
