"""Channel balancing (SmoothQuant; ViDiT-Q fits it per range of noise levels): X' = X / s, W' = W s.

s_c = A_c^alpha / (amax_o |W_oc|)^(1 - alpha) with A_c the magnitude of input channel c. Legend: O, C, n
reservoir rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from viditq.errors import UserError
from viditq.quant.calibration.segment_stats import AGGREGATES, EMA_STARTS, SegmentStats
from viditq.quant.description.registry import TRANSFORMS
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.description.specs import TransformSpec
from viditq.quant.methods.quantizer import dequantize_weight, fake_quantize_activation, quantize_weight
from viditq.quant.methods.ranges.activation import static_grid
from viditq.quant.methods.transforms.base import Chain, Transform
from viditq.quant.numerics.granularity import column_amax

AUTO_ALPHAS = tuple(i / 20 for i in range(21))


class Smooth(Transform):
    """x / scale, w * scale; scale [C] is positive and finite."""

    scale: Tensor

    def __init__(self, scale_C: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale_C)

    def activation(self, x: Tensor) -> Tensor:
        return x / self.scale

    def weight(self, weight_OC: Tensor) -> Tensor:
        return weight_OC * self.scale

    def bounds(self, minimum_C: Tensor, maximum_C: Tensor) -> tuple[Tensor, Tensor]:
        return minimum_C / self.scale, maximum_C / self.scale


def smooth_scale(amax_C: Tensor, weight_amax_C: Tensor, alpha: float) -> Tensor:
    """s, float32; 1 for a channel that is always 0 or has no weight."""
    scale_C = amax_C.float() ** alpha / weight_amax_C.float() ** (1 - alpha)
    usable = (amax_C > 0) & (weight_amax_C > 0) & torch.isfinite(scale_C) & (scale_C > 0)
    return torch.where(usable, scale_C, torch.ones_like(scale_C))


@TRANSFORMS.register("smooth")
@dataclass(frozen=True)
class SmoothSpec(TransformSpec):
    """Describes a Smooth.

    alpha: in [0, 1], or one per segment (low noise first), or "auto" = per layer, the best of 21 by output
    error on calibration rows. per_segment: scales from each segment's own statistics instead of those of all
    noise levels.
    aggregate: how a channel's magnitude is taken (ema | max | percentile); percentile: 0 to 100, for that
    choice.
    ema_from: where the running mean begins: at pure noise, as a sampler steps, or at clean samples, as the original's
    calibration does. What it begins with weighs most (0.95^19 = 0.38 of 20 buckets). It runs over the statistics'
    buckets: where there are more sampling steps, those that share a bucket count as one.
    min_gain: 0 to 1; layers get scales, and so codes, of their own for each segment only where these take at least this
    part off their output's error (squared); the others keep one set for all noise levels. None = all layers do.
    """

    name: ClassVar[str] = "smooth"
    needs_stats: ClassVar[bool] = True
    rows_apart: ClassVar[bool] = True

    alpha: float | str | tuple[float, ...] = 0.5
    per_segment: bool = False
    aggregate: str = "ema"
    percentile: float = 99.9
    ema_from: str = "noise"
    min_gain: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.alpha, Sequence) and not isinstance(self.alpha, str):
            object.__setattr__(self, "alpha", tuple(self.alpha))
        for alpha in self.alpha if isinstance(self.alpha, tuple) else (self.alpha,):
            if alpha != "auto" and not (_is_number(alpha) and 0.0 <= alpha <= 1.0):
                raise UserError(f"alpha={alpha!r} is not possible: give a number in [0, 1], one per segment, or 'auto'")
        if self.aggregate not in AGGREGATES:
            raise UserError(f"aggregate={self.aggregate!r} is unknown; choose one of {', '.join(AGGREGATES)}")
        if self.ema_from not in EMA_STARTS:
            raise UserError(f"ema_from={self.ema_from!r} is unknown; choose one of {', '.join(EMA_STARTS)}")
        if not _is_number(self.percentile) or not 0 < self.percentile <= 100:
            raise UserError(f"percentile={self.percentile!r} is not possible: give a number above 0 and up to 100")
        if not isinstance(self.per_segment, bool):
            raise UserError(f"per_segment={self.per_segment!r} must be true or false")
        if self.min_gain is not None and not (_is_number(self.min_gain) and 0 <= self.min_gain <= 1):
            raise UserError(f"min_gain={self.min_gain!r} is not possible: give a number in [0, 1], or null")
        if self.min_gain is not None and not self.per_segment:
            raise UserError(
                f"min_gain={self.min_gain} changes nothing here: it is about scales for each segment. Leave it out, or "
                "set per_segment=true (quant/smoothing=timestep_aware)."
            )

    def to_dict(self) -> dict[str, Any]:
        """Without a `min_gain` that nothing asks for: plans that were made before it hold the same bytes."""
        fields = super().to_dict()
        if self.min_gain is None:
            del fields["min_gain"]
        return fields

    @property
    def differs_by_segment(self) -> bool:
        return self.per_segment

    @property
    def is_open(self) -> bool:
        return self.min_gain is not None

    def for_segment(self, index: int, num_segments: int) -> SmoothSpec:
        if not isinstance(self.alpha, tuple):
            return self
        if len(self.alpha) != num_segments:
            raise UserError(
                f"alpha={list(self.alpha)} has {len(self.alpha)} values for {num_segments} segments; "
                "give one number for all segments, or one per segment"
            )
        return replace(self, alpha=self.alpha[index])

    def fit(self, weight_OC: Tensor, stats: SegmentStats, scheme: LayerScheme) -> Smooth:
        amax_C = stats.amax(self.aggregate, self.percentile, self.ema_from).to(weight_OC.device)
        weight_amax_C = column_amax(weight_OC)
        if self.alpha != "auto":
            assert isinstance(self.alpha, int | float)
            return Smooth(smooth_scale(amax_C, weight_amax_C, self.alpha))
        weight_OC = weight_OC.detach().float()
        candidates = [Smooth(smooth_scale(amax_C, weight_amax_C, alpha)) for alpha in AUTO_ALPHAS]
        return min(candidates, key=lambda smooth: _output_error(smooth, weight_OC, stats, scheme))

    def empty(self, in_features: int) -> Smooth:
        return Smooth(torch.empty(in_features, device="meta"))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _output_error(smooth: Smooth, weight_OC: Tensor, stats: SegmentStats, scheme: LayerScheme) -> float:
    """Squared error of the Linear's output on the reservoir rows, quantized by `scheme` after `smooth`.

    What follows in the scheme's chain is applied; rounding, ranges of weights and low rank are left out, being slow.
    """
    x_nC = stats.rows.to(weight_OC.device)
    reference_nO = F.linear(x_nC, weight_OC)
    rest = [t.fit(weight_OC, None, scheme) for t in scheme.transforms if not t.needs_stats]
    chain = Chain([smooth, *rest])
    x_nC, weight_OC = chain.activation(x_nC), chain.weight(weight_OC)
    if scheme.weight is not None:
        weight_OC = dequantize_weight(quantize_weight(weight_OC, scheme.weight), scheme.weight)
    if scheme.activation is not None:
        static = None
        if scheme.static_activation:
            static = static_grid(chain, stats, scheme.activation, scheme.activation_ranges, weight_OC)
        # one row = one token; a leading axis of 1 makes dynamic "tensor" take all rows together
        x_nC = fake_quantize_activation(x_nC[None], scheme.activation, static)[0]
    return float((F.linear(x_nC, weight_OC) - reference_nO).double().square().sum())
