"""Frechet distance between Gaussians fitted to the features of two sets of clips (FID: images, FVD: video).

Axes: B clips, F frames, C channels, H height, W width, N clips of all batches, D features.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.metrics.batch import EvalBatch, to_unit
from viditq.metrics.jackknife import group_jackknife
from viditq.metrics.once import once
from viditq.metrics.streaming import StreamingMetric

SETS = ("reference", "data")
GROUPS = 20  # left out one at a time for the standard error


def frechet_distance(a_ND: Tensor, b_MD: Tensor, gram_NM: Tensor | None = None) -> Tensor:
    """|mean_a - mean_b|^2 + tr C_a + tr C_b - 2 tr (C_a C_b)^(1/2), covariances unbiased; 0-d float64.

    With C = X^T X / (n - 1) of centred X, the last trace is the sum of the singular values of A B^T over the roots of
    n - 1: exact for fewer samples than features, where a root of the singular product is not. A set of more samples
    than features is replaced by its triangular factor [D, D], so no matrix is larger than the smaller dimension.
    `gram_NM`: A B^T of these rows before centring, where it is known. Needs two samples a side.
    """
    a_ND, b_MD = a_ND.double(), b_MD.double()
    mean = (a_ND.mean(0) - b_MD.mean(0)).square().sum()
    a_ND, b_MD = (_centred(x, 0) / (len(x) - 1) ** 0.5 for x in (a_ND, b_MD))
    if gram_NM is None:
        cross = _triangle(a_ND) @ _triangle(b_MD).T
    else:
        cross = _centred(_centred(gram_NM, 0), 1) / ((len(a_ND) - 1) * (len(b_MD) - 1)) ** 0.5
    traces = a_ND.square().sum() + b_MD.square().sum()
    return (mean + traces - 2 * torch.linalg.svdvals(cross).sum()).clamp(min=0)


def _centred(x: Tensor, dim: int) -> Tensor:
    return x - x.mean(dim, keepdim=True)


def _triangle(x_ND: Tensor) -> Tensor:
    return torch.linalg.qr(x_ND, mode="r").R if x_ND.shape[0] > x_ND.shape[1] else x_ND


def distance_of_rows(a_ND: Tensor, b_ND: Tensor) -> Callable[[Tensor], Tensor]:
    """`frechet_distance` of the given rows of both sets; many subsets share one product of the features."""
    common = b_ND.double().mean(0)  # a large mean would cost digits of the product
    a_ND, b_ND = a_ND.double() - common, b_ND.double() - common
    gram_NN = a_ND @ b_ND.T if a_ND.shape[0] <= a_ND.shape[1] else None
    return lambda r: frechet_distance(a_ND[r], b_ND[r], None if gram_NN is None else gram_NN[r][:, r])


def _with_errors(statistic: Callable[[Tensor], Tensor], number: int) -> tuple[Tensor, Tensor]:
    """A statistic of all prompts and its standard errors, nan where a smaller set has no distance."""
    if number < 3:
        value = statistic(torch.arange(number))
        return value, torch.full_like(value, torch.nan)
    return group_jackknife(statistic, number, GROUPS)


class FeatureDistance(StreamingMetric):
    """A distance from the features of the samples to those of the float model's clips or of real ones.

    `features`: a module with `features(clips_BFCHW in [0, 1]) -> [B, D]`. `against`: "reference" (the float
    model's clips) or "data" (real clips; `compute` then adds reference_value, the float model's own distance
    to them). `standard_error`, and for "data" `difference_error` (of value - reference_value), come from leaving out a
    20th of the prompts at a time, the same of all sets. Fewer prompts than `least` raise UserError.
    """

    higher_is_better = False
    least = 2

    def __init__(self, features: nn.Module, against: str, name: str, unit: str = "") -> None:
        if against not in SETS:
            raise UserError(f"against is {against!r}. Use one of: {', '.join(SETS)}.")
        self.sides = ("samples", "references") if against == "reference" else ("samples", "references", "data")
        super().__init__(name, unit, index=torch.int64, **dict.fromkeys(self.sides, torch.float32))
        self.has_float_value = against == "data"
        self.features: Any = features.eval().requires_grad_(False)

    def update(self, batch: EvalBatch) -> None:
        """Keep the features of `batch`."""
        if "data" in self.sides and batch.data is None:
            raise UserError(f"{self.name} compares with real clips, and this model has none. Leave the metric out.")
        self.append("index", batch.index)
        for side in self.sides:
            clips, key = getattr(batch, side), ("features", side, self.features)
            self.append(side, once(batch, key, partial(self._features, clips), clips))

    def _features(self, clips_BFCHW: Tensor) -> Tensor:
        return self.features.features(to_unit(clips_BFCHW)).flatten()

    def compute(self) -> dict[str, Tensor]:
        """Distance from the samples to the set that `against` names."""
        index = self.joined("index")
        number = len(index)
        if number < self.least:
            raise UserError(f"{self.name} needs at least {self.least} prompts, {number} given. Raise the number.")
        assert len(index.unique()) == number, "a pair was scored twice: shards must not be padded"
        order = index.argsort()
        samples, references, *data = (self.joined(side).view(number, -1)[order] for side in self.sides)
        pairs = [(samples, data[0]), (references, data[0])] if data else [(samples, references)]
        values, errors = self.estimate([self.distance_of_rows(a, b) for a, b in pairs], number)
        result = {"value": values[0], "standard_error": errors[0], **self.told(samples.shape[1])}
        return result | ({"reference_value": values[1], "difference_error": errors[2]} if data else {})

    def distance_of_rows(self, a_ND: Tensor, b_ND: Tensor) -> Callable[[Tensor], Tensor]:
        """The distance of given rows of both sets, as a function of ascending row numbers."""
        raise NotImplementedError

    def told(self, num_features: int) -> dict[str, Tensor]:
        """What `compute` adds for the verdict."""
        raise NotImplementedError

    def estimate(self, distances: list[Callable[[Tensor], Tensor]], number: int) -> tuple[Tensor, Tensor]:
        """Each distance, then the first less each other, with their standard errors."""

        def statistic(rows: Tensor) -> Tensor:
            found = torch.stack([distance(rows) for distance in distances])
            return torch.cat([found, found[:1] - found[1:]])

        return _with_errors(statistic, number)


class FrechetDistance(FeatureDistance):
    """Frechet distance from the samples to the float model's clips or to real ones.

    The distance grows as the number of samples falls: compare at equal numbers only (`num_features` tells how many
    would do). Its errors are nan for fewer than 3 prompts.
    """

    def distance_of_rows(self, a_ND: Tensor, b_ND: Tensor) -> Callable[[Tensor], Tensor]:
        """`frechet_distance` of rows."""
        return distance_of_rows(a_ND, b_ND)

    def told(self, num_features: int) -> dict[str, Tensor]:
        """How many features there are."""
        return {"num_features": torch.tensor(num_features)}
