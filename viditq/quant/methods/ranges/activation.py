"""The grid of a static activation, behind its chain of transforms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.specs import RangeSpec
from viditq.quant.methods.quantizer import static_qparams
from viditq.quant.methods.ranges.min_max import MinMax
from viditq.quant.numerics import granularity

if TYPE_CHECKING:
    from viditq.quant.calibration.segment_stats import SegmentStats
    from viditq.quant.methods.transforms.base import Chain, Transform


def static_grid(
    chain: Chain | Transform, stats: SegmentStats, spec: QuantSpec, ranges: RangeSpec, like: Tensor
) -> tuple[Tensor, Tensor]:
    """float32 scale and zero point: tensor [1], channel [C], group [G, 1], on the device of `like`.

    min_max takes the extremes of all inputs ever seen where the chain keeps channels apart. A rotation mixes them, and
    what bounds a sum of 1,152 channels from their extremes is an order of magnitude too wide; so behind it, and for
    all other ranges, the kept input rows go through the chain. A rotated channel, a sum of many, has light tails: its
    extremes over a few hundred rows are close to those over all, and what lies beyond is clipped.

    A search by error (`counts_extremes`) takes the smallest and the largest value of each channel as two more rows:
    what it has not seen it would cut off, which at 8 bits costs more than all rounding (2 dB on tiny_image).
    """
    bounds = chain.bounds(stats.minimum.to(like.device), stats.maximum.to(like.device))
    if isinstance(ranges, MinMax) and bounds is not None:
        return static_qparams(*bounds, spec)
    rows_nC = chain.activation(ranges.rows_of(stats).to(like.device).float())
    if ranges.counts_extremes and bounds is not None:
        rows_nC = torch.cat([rows_nC, torch.stack(bounds)])
    sets = granularity.activation_sets(rows_nC, spec.granularity, spec.group_size)
    scale, zero_point = ranges.fit(sets, spec)
    return (scale, zero_point) if spec.granularity == "group" else (scale.flatten(), zero_point.flatten())
