"""Which layers get scales and codes of their own for each segment, and which keep one set for all noise levels.

A weight smoothed by other scales has other codes, so that scales for each segment store it once a segment. A layer is
given them where they take enough off its output's error; the rest is smoothed as `quant/smoothing=static` would.
Legend: O out_features, C in_features, n input rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from viditq.quant.calibration.segment_sources import segment_sources
from viditq.quant.calibration.statistics import CalibrationStats
from viditq.quant.convert import fit_variant
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.execution.backends import get_backend
from viditq.quant.execution.variant import Variant
from viditq.quant.methods.transforms import SmoothSpec
from viditq.quant.search.proxy import TINY

SHARED = "shared"  # ends the names of schemes that have one set of codes


@dataclass(frozen=True)
class SharedCodes:
    """plan: with nothing left open. shared: layers with one set of codes for all segments. gains: layer -> the part of
    its output's error (squared and relative, mean over segments) that scales for each segment take off; below 0 where
    one scale for all does better.
    """

    plan: QuantPlan
    shared: list[str]
    gains: dict[str, float]


def share_codes(denoiser: nn.Module, plan: QuantPlan, stats: CalibrationStats) -> SharedCodes:
    """Decide the layers that `plan` leaves open (`min_gain` of their smoothing).

    Measured is the output's error on the input rows that calibration kept, quantized as the plan says, rounding
    included (what is learned block by block: as it starts). Where alpha differs by segment, one set of codes takes the
    one with the least error. Layers that have other bits in some segment keep scales for each. Raises UserError for
    layers that the statistics lack.
    """
    schemes, layers = dict(plan.schemes), dict(plan.layers)
    shared, gains = [], dict[str, float]()
    sources = segment_sources(denoiser, plan, stats)
    for layer in plan.open_layers:
        names = [name for name in plan.layers[layer] if name is not None]
        own = [schemes[name] for name in names]
        if len(names) < plan.num_segments or len({_with(scheme, alpha=0.5) for scheme in own}) > 1:
            continue
        measured = OutputError(layer, denoiser.get_submodule(layer), stats, plan.edges, sources[layer])
        together = {
            f"{name}_{SHARED}": _with(scheme, per_segment=False, min_gain=None)
            for name, scheme in zip(names, own, strict=True)
        }
        errors = {name: measured.mean([scheme] * len(names)) for name, scheme in together.items()}
        best = min(errors, key=errors.__getitem__)
        gains[layer] = 1 - measured.mean(own) / max(errors[best], TINY)
        if gains[layer] < _min_gain(own[0]):
            schemes[best], layers[layer] = together[best], (best,) * len(names)
            shared.append(layer)
        stats.let_go(layer)
    used = {name for names in layers.values() for name in names}
    kept = {name: _with(scheme, min_gain=None) for name, scheme in schemes.items() if name in used}
    return SharedCodes(replace(plan, schemes=kept, layers=layers), shared, gains)


def _min_gain(scheme: LayerScheme) -> float:
    return max(part.min_gain or 0.0 for part in scheme.transforms if isinstance(part, SmoothSpec))


def _with(scheme: LayerScheme, **changes: Any) -> LayerScheme:
    """With another smoothing, where it has one that is open."""
    parts = (replace(p, **changes) if isinstance(p, SmoothSpec) and p.is_open else p for p in scheme.transforms)
    return replace(scheme, transforms=tuple(parts))


class OutputError:
    """Of one Linear, quantized in several ways."""

    def __init__(
        self, name: str, linear: Any, stats: CalibrationStats, edges: Sequence[float], sources: Sequence[int]
    ) -> None:
        """sources: for each segment the one whose statistics it takes."""
        self._name, self._linear, self._stats = name, linear, stats
        self._ranges = [(edges[source], edges[source + 1]) for source in sources]
        self._backend = get_backend("fake")

    @torch.no_grad()
    def mean(self, schemes: Sequence[LayerScheme]) -> float:
        """Over segments, ||quantized(x) - float(x)||^2 / ||float(x)||^2 on their input rows; schemes: of each."""
        fitted: dict[Any, Variant] = {}
        errors = {}
        for scheme, levels in zip(schemes, self._ranges, strict=True):
            key = (scheme, levels if scheme.per_segment else None)
            if key not in fitted:
                fitted[key] = fit_variant(self._name, self._linear, scheme, self._stats, *levels, torch.float32)
                self._backend.prepare(fitted[key])
            errors[levels] = self._relative(fitted[key], levels)
        return sum(errors.values()) / len(errors)

    def _relative(self, variant: Variant, levels: tuple[float, float]) -> float:
        rows_nC = self._stats.segment(self._name, *levels).rows.to(self._linear.weight.device)
        exact_nO = (rows_nC @ self._linear.weight.float().T).double()
        # one row = one token; a leading axis of 1 makes dynamic "tensor" take all rows together
        error_nO = self._backend.linear(variant, rows_nC[None], None)[0] - exact_nO
        return float(error_nO.square().sum() / exact_nO.square().sum().clamp(min=TINY))
