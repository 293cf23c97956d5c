"""Frechet distance between Gaussians fitted to the features of two sets of clips (FID: images, FVD: video).

Axes: B clips, F frames, C channels, H height, W width, D features.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.metrics.batch import EvalBatch, to_unit
from viditq.metrics.streaming import StreamingMetric

SETS = ("reference", "data")


class Moments(NamedTuple):
    """Sums over n features, float64: `number` 0-d, `total` [D], `outer` [D, D]."""

    number: Tensor
    total: Tensor
    outer: Tensor


def moments(features_BD: Tensor) -> Moments:
    """The sums of one batch of features."""
    x = features_BD.double()
    return Moments(x.new_tensor(len(x)), x.sum(0), x.T @ x)


def _root(m: Moments) -> Tensor:
    """A factor L [D, r] of the unbiased covariance, L L^T; directions without variance are dropped."""
    mean = m.total / m.number
    covariance = (m.outer - m.number * torch.outer(mean, mean)) / (m.number - 1)
    values, vectors = torch.linalg.eigh(covariance)
    # Rounding of the sums decides what is noise, not the covariance: features may share a large mean.
    noise = len(mean) * torch.finfo(values.dtype).eps * (m.outer.diagonal().amax() / m.number)
    kept = values > torch.maximum(noise, len(mean) * torch.finfo(values.dtype).eps * values[-1])
    return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(a: Moments, b: Moments) -> Tensor:
    """|mean_a - mean_b|^2 + tr C_a + tr C_b - 2 tr (C_a C_b)^(1/2), 0-d.

    With C = L L^T the last trace is the sum of the singular values of L_a^T L_b, which stays exact for fewer
    samples than features, where a square root of the singular product does not. Needs two samples a side.
    """
    root_a, root_b = _root(a), _root(b)
    mean = (a.total / a.number - b.total / b.number).square().sum()
    cross = torch.linalg.svdvals(root_a.T @ root_b).sum()
    return (mean + root_a.square().sum() + root_b.square().sum() - 2 * cross).clamp(min=0)


class FrechetDistance(StreamingMetric):
    """Frechet distance from the samples to the float model's clips or to real ones.

    `features`: a module with `features(clips_BFCHW in [0, 1]) -> [B, D]`. `against`: "reference" (the float
    model's clips) or "data" (real clips; `compute` then adds reference_value, the float model's own distance
    to them). The distance grows as the number of samples falls: compare at equal numbers only. It has no
    standard error (nan).
    """

    higher_is_better = False

    def __init__(self, features: nn.Module, against: str, name: str) -> None:
        if against not in SETS:
            raise UserError(f"against is {against!r}. Use one of: {', '.join(SETS)}.")
        self.sides = ("samples", "references") if against == "reference" else ("samples", "references", "data")
        states = [f"{side}_{field}" for side in self.sides for field in Moments._fields]
        super().__init__(name, unit="", **dict.fromkeys(states, torch.float64))
        self.features: Any = features.eval().requires_grad_(False)

    def update(self, batch: EvalBatch) -> None:
        """Add the features of `batch` to the running sums."""
        if "data" in self.sides and batch.data is None:
            raise UserError(f"{self.name} compares with real clips, and this model has none. Leave the metric out.")
        for side in self.sides:
            self._add(side, moments(self.features.features(to_unit(getattr(batch, side)))))

    def _add(self, side: str, new: Moments) -> None:
        for field, value in new._asdict().items():
            # One piece per process that saw anything, so lengths tell how many did.
            state, piece = f"{side}_{field}", value.flatten()
            before = self.joined(state)
            setattr(self, state, [piece + before if len(before) else piece])

    def _moments(self, side: str) -> Moments:
        count, total, outer = (self.joined(f"{side}_{field}") for field in Moments._fields)
        if count.sum() < 2:
            raise UserError(f"{self.name} needs at least 2 prompts, {int(count.sum())} given. Raise the number.")
        total = total.view(len(count), -1).sum(0)
        return Moments(count.sum(), total, outer.view(len(count), -1).sum(0).view(len(total), len(total)))

    def compute(self) -> dict[str, Tensor]:
        """Distance from the samples to the set that `against` names."""
        samples, references, *data = (self._moments(side) for side in self.sides)
        value = frechet_distance(samples, data[0] if data else references)
        result = {"value": value, "standard_error": torch.full_like(value, torch.nan)}
        return result | ({"reference_value": frechet_distance(references, data[0])} if data else {})
