"""Evaluation as a Lightning `test` loop over pairs of sample files."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Metric

from viditq.data.prompts import PromptData
from viditq.data.samples import load_sample, sample_path
from viditq.metrics.batch import EvalBatch

Results = dict[str, dict[str, Tensor]]


class Pairs(Dataset[EvalBatch]):
    """Batches of (sample, reference) pairs, with real clips where the data has them."""

    def __init__(
        self, samples: Path, references: Path, data: PromptData, modality: str, batches: Sequence[list[int]]
    ) -> None:
        self.samples, self.references, self.data = samples, references, data
        self.modality, self.batches = modality, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> EvalBatch:
        indices = self.batches[number]
        return EvalBatch(
            samples=self._load(self.samples, indices),
            references=self._load(self.references, indices),
            prompts=[self.data.prompts[i] for i in indices],
            index=torch.tensor(indices),
            data=self.data.real_clips(indices),
        )

    def _load(self, folder: Path, indices: list[int]) -> Tensor:
        return torch.stack([load_sample(sample_path(folder, i, self.modality)) for i in indices])


class Evaluation(L.LightningModule):
    """Feeds every metric; `results` holds what each computed, synchronised over processes."""

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        super().__init__()
        self.metrics = dict(metrics)
        self.registered = nn.ModuleDict(metrics)  # moved to the device with this module
        self.results: Results = {}

    def transfer_batch_to_device(self, batch: EvalBatch, device: torch.device, dataloader_idx: int) -> EvalBatch:
        """Lightning does not move frozen dataclasses by itself."""
        tensors: dict[str, Any] = {k: v.to(device) for k, v in vars(batch).items() if isinstance(v, Tensor)}
        return dataclasses.replace(batch, **tensors)

    def test_step(self, batch: EvalBatch, batch_idx: int) -> None:
        """Update all metrics with one batch of pairs."""
        for metric in self.metrics.values():
            metric.update(batch)

    def on_test_epoch_end(self) -> None:
        """Compute (and thereby synchronise) all metrics."""
        self.results = {name: metric.compute() for name, metric in self.metrics.items()}


def evaluate(trainer: L.Trainer, metrics: Mapping[str, Metric], pairs: Pairs) -> Results:
    """Name -> what the metric computed (value, standard_error, per_sample ...)."""
    module = Evaluation(metrics)
    trainer.test(module, DataLoader(pairs, batch_size=None), verbose=False)
    return module.results
