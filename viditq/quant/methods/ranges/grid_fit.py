"""Closed-form grid fit: fix the codes, solve scale and zero point by least squares, take new codes, and again.

Legend: S sets of values that share a scale, E elements of each.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.quant.description.fields import is_int
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.registry import RANGES
from viditq.quant.description.specs import RangeSpec
from viditq.quant.methods.ranges.search import best_shrunk, error_sums
from viditq.quant.numerics.affine import code_range, quantize, usable_scale
from viditq.quant.numerics.size import at_unit_size

# Shrunk ranges: one that holds the extremes is a poor start, its codes never clip.
STARTS = [1 - i / 25 for i in range(20)]


@RANGES.register("grid_fit")
@dataclass(frozen=True)
class GridFit(RangeSpec):
    """At most `iterations` alternations from the best of 20 shrunk ranges; the squared error never grows."""

    name: ClassVar[str] = "grid_fit"
    counts_extremes: ClassVar[bool] = True

    iterations: int = 20

    def __post_init__(self) -> None:
        if not is_int(self.iterations) or self.iterations < 1:
            raise UserError(f"iterations={self.iterations!r} is not possible: give a whole number from 1")

    def fit(self, values_SE: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        values_SE, size_S1 = at_unit_size(values_SE)
        scale, zero_point = best_shrunk(values_SE, spec, STARTS, 2.0)
        error = error_sums(values_SE, scale, zero_point, spec)
        for _ in range(self.iterations):
            codes = quantize(values_SE, scale, zero_point, spec.bits, spec.symmetric).to(values_SE.dtype)
            trial = least_squares_grid(values_SE, codes, spec)
            trial_error = error_sums(values_SE, *trial, spec)
            better = trial_error < error
            if not better.any():
                break
            scale, zero_point = (torch.where(better, t, old) for t, old in zip(trial, (scale, zero_point), strict=True))
            error = torch.where(better, trial_error, error)
        return usable_scale(scale * size_S1), zero_point


def least_squares_grid(values_SE: Tensor, codes_SE: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The scale and zero point [S, 1] under which fixed codes come closest to the values.

    The zero point of the joint solution is rounded (it is stored as a code), then the scale is solved once more; NaN
    where that is not above 0.
    """
    zero_point = torch.zeros_like(values_SE[:, :1])
    if not spec.symmetric:
        mean_x, mean_q = values_SE.mean(1, True), codes_SE.mean(1, True)
        centred = codes_SE - mean_q
        slope = (values_SE * centred).sum(1, True) / centred.square().sum(1, True)
        zero_point = (mean_q - mean_x / slope).nan_to_num().round().clamp(*code_range(spec.bits, False))
    levels = codes_SE - zero_point
    scale = (values_SE * levels).sum(1, True) / levels.square().sum(1, True)
    return scale.where(scale > 0, torch.nan), zero_point
