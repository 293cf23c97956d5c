"""Smoothing that the layer before can take over: X' = X / s, W' = W s, s_c = 2^round(alpha log2(A_c / max A)).

A_c is the magnitude of input channel c. Weights have no part in s, so that all Linears that read one tensor have the
same; powers of two change no bit of a weight; and none is above 1, since a modulation holds (1 + scale) / s less 1,
of which 16 bits would leave little for a large s.

Legend: O out_features, C in_features.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.quant.calibration.segment_stats import AGGREGATES, SegmentStats
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.registry import TRANSFORMS
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.description.specs import TransformSpec
from viditq.quant.methods.transforms.smooth import Smooth

FLAT = "flat"  # ends the names of schemes that have lost it


def foldable_scale(amax_C: Tensor, alpha: float) -> Tensor:
    """s, float32; 1 for a channel that is always 0."""
    share_C = amax_C.float() / amax_C.max().clamp(min=torch.finfo(torch.float32).tiny)
    scale_C = torch.exp2((alpha * share_C.log2()).round())
    return torch.where(share_C > 0, scale_C, torch.ones_like(scale_C))


@TRANSFORMS.register("foldable")
@dataclass(frozen=True)
class FoldableSpec(TransformSpec):
    """Describes a Smooth that an export can fold away; the same for all segments.

    alpha: 0 (nothing is smoothed) to 1 (all channels to one magnitude). aggregate: how a magnitude is taken, as of
    SmoothSpec: ema | max | percentile (then the 99.9th).
    """

    name: ClassVar[str] = "foldable"
    needs_stats: ClassVar[bool] = True
    rows_apart: ClassVar[bool] = True

    alpha: float = 0.5
    aggregate: str = "max"

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 <= self.alpha <= 1:
            raise UserError(f"alpha={self.alpha!r} is not possible: give a number in [0, 1], the same for all segments")
        if self.aggregate not in AGGREGATES:
            raise UserError(f"aggregate={self.aggregate!r} is unknown; choose one of {', '.join(AGGREGATES)}")

    def fit(self, weight_OC: Tensor, stats: SegmentStats, scheme: LayerScheme) -> Smooth:
        return Smooth(foldable_scale(stats.amax(self.aggregate).to(weight_OC.device), self.alpha))

    def empty(self, in_features: int) -> Smooth:
        return Smooth(torch.empty(in_features, device="meta"))


def smooths_foldably(plan: QuantPlan, layer: str) -> bool:
    """Whether any segment of a layer has this smoothing."""
    names = plan.layers.get(layer, ())
    return any(isinstance(t, FoldableSpec) for name in names if name for t in plan.schemes[name].transforms)


def without_foldable(plan: QuantPlan, layers: Collection[str]) -> QuantPlan:
    """The plan with this smoothing taken from these layers."""
    schemes, changed = dict(plan.schemes), dict(plan.layers)
    for layer in layers:
        if not smooths_foldably(plan, layer):
            continue
        for name in filter(None, plan.layers[layer]):
            kept = tuple(t for t in plan.schemes[name].transforms if not isinstance(t, FoldableSpec))
            schemes[f"{name}_{FLAT}"] = replace(plan.schemes[name], transforms=kept)
        changed[layer] = tuple(name and f"{name}_{FLAT}" for name in plan.layers[layer])
    used = {name for names in changed.values() for name in names}
    return replace(plan, schemes={n: s for n, s in schemes.items() if n in used}, layers=changed)
