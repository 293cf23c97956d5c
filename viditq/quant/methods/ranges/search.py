"""L_p search: of shrunk ranges, the one whose rounding error has the least L_p norm (Q-Diffusion: p 2.4, 80 factors).

Legend: S sets of values that share a scale, E elements of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.quant.description.fields import is_int
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.registry import RANGES
from viditq.quant.description.specs import RangeSpec
from viditq.quant.numerics.affine import compute_qparams, fake_quantize, usable_scale
from viditq.quant.numerics.size import at_unit_size

CHUNK = 2**17  # elements searched at once, so that what a try writes stays in the cache


@RANGES.register("lp")
@dataclass(frozen=True)
class LpSearch(RangeSpec):
    """Ranges [f lo, f hi] with f = 1, 0.99, 0.98, ...: `num_shrinks` of them, compared by sum |x - x^|^p."""

    name: ClassVar[str] = "lp"
    counts_extremes: ClassVar[bool] = True

    p: float = 2.4
    num_shrinks: int = 80

    def __post_init__(self) -> None:
        if not isinstance(self.p, int | float) or isinstance(self.p, bool) or not 0 < self.p <= 10:
            raise UserError(f"p={self.p!r} is not possible: give a number above 0 and up to 10, such as 2 or 2.4")
        if not is_int(self.num_shrinks) or not 1 <= self.num_shrinks <= 99:
            raise UserError(f"num_shrinks={self.num_shrinks!r} is not possible: give a whole number from 1 to 99")

    def fit(self, values_SE: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        values_SE, size_S1 = at_unit_size(values_SE)
        scale, zero_point = best_shrunk(values_SE, spec, [1 - i / 100 for i in range(self.num_shrinks)], self.p)
        return usable_scale(scale * size_S1), zero_point


def best_shrunk(values_SE: Tensor, spec: QuantSpec, factors: Sequence[float], p: float) -> tuple[Tensor, Tensor]:
    """Scale and zero point [S, 1] of the best factor of each set; the earliest of equals."""
    lo, hi = values_SE.amin(1, True), values_SE.amax(1, True)
    scales, zero_points = zip(
        *(compute_qparams(lo * f, hi * f, spec.bits, spec.symmetric) for f in factors), strict=True
    )
    errors = [error_sums(values_SE, s, z, spec, p) for s, z in zip(scales, zero_points, strict=True)]
    best = torch.stack(errors).argmin(0, keepdim=True)
    return torch.stack(scales).gather(0, best)[0], torch.stack(zero_points).gather(0, best)[0]


def error_sums(values_SE: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, p: float = 2.0) -> Tensor:
    """sum |x - x^|^p of each set, [S, 1] float64."""
    total = torch.zeros(len(values_SE), 1, dtype=torch.float64, device=values_SE.device)
    rows = max(CHUNK // values_SE.shape[1], 1)
    for start in range(0, len(values_SE), rows):
        part = slice(start, start + rows)
        for x in values_SE[part].split(CHUNK, 1):
            error = fake_quantize(x, scale[part], zero_point[part], spec.bits, spec.symmetric).sub_(x)
            error = error.square_() if p == 2 else error.abs_().pow_(p)
            total[part] += error.sum(1, keepdim=True, dtype=torch.float64)
    return total
