"""PTQ4DiT's balancing: smoothing with alpha 0.5 whose activation salience is weighted over noise levels.

s_rho(X) = sum_t eta_t amax|X^t|, eta_t proportional to exp(-rho_t), rho_t = Spearman(amax|X^t|, amax|W|) over channels;
X' = X / s, W' = W s, s = sqrt(s_rho(X) / amax|W|), which leaves both with the salience sqrt(s_rho(X) amax|W|)
(Wu et al., arXiv 2405.16005). t is a bucket of noise levels; steps in one bucket count once.

Legend: O, C as elsewhere, K buckets with data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from viditq.quant.calibration.segment_stats import SegmentStats
from viditq.quant.description.registry import TRANSFORMS
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.description.specs import TransformSpec
from viditq.quant.methods.transforms.smooth import Smooth, smooth_scale
from viditq.quant.numerics.granularity import column_amax


def ranks(values_C: Tensor) -> Tensor:
    """1 for the smallest; equal ones share their mean rank; float64."""
    _, place_C, count = values_C.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count.double() - 1) / 2)[place_C]


def spearman(first_C: Tensor, second_C: Tensor) -> Tensor:
    """Rank correlation, float64; 0 where one of the two is constant."""
    one, two = (ranks(values) - (len(values) + 1) / 2 for values in (first_C, second_C))
    return ((one * two).sum() / (one.norm() * two.norm())).nan_to_num()


def weighted_salience(amax_KC: Tensor, weight_amax_C: Tensor) -> Tensor:
    """s_rho(X), float32 [C]."""
    correlation_K = torch.stack([spearman(amax_C, weight_amax_C) for amax_C in amax_KC])
    return (torch.softmax(-correlation_K, 0)[:, None] * amax_KC.double()).sum(0).float()


@TRANSFORMS.register("salience")
@dataclass(frozen=True)
class SalienceSpec(TransformSpec):
    """Describes a Smooth by complementary saliences; the same for all segments."""

    name: ClassVar[str] = "salience"
    needs_stats: ClassVar[bool] = True
    rows_apart: ClassVar[bool] = True

    def fit(self, weight_OC: Tensor, stats: SegmentStats, scheme: LayerScheme) -> Smooth:
        weight_amax_C = column_amax(weight_OC)
        amax_C = weighted_salience(stats.bucket_amax.to(weight_OC.device), weight_amax_C)
        return Smooth(smooth_scale(amax_C, weight_amax_C, 0.5))

    def empty(self, in_features: int) -> Smooth:
        return Smooth(torch.empty(in_features, device="meta"))
