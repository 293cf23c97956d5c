"""Ranges read off the values: their extremes, or all but a few of them.

Legend: S sets of values that share a scale, E elements of each.
"""

from dataclasses import dataclass
from math import ceil
from typing import ClassVar

from torch import Tensor

from viditq.errors import UserError
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.registry import RANGES
from viditq.quant.description.specs import RangeSpec
from viditq.quant.methods.quantizer import range_grid


@RANGES.register("min_max")
@dataclass(frozen=True)
class MinMax(RangeSpec):
    """From the smallest to the largest value: nothing is clipped."""

    name: ClassVar[str] = "min_max"
    rows_apart: ClassVar[bool] = True

    def fit(self, values_SE: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        return range_grid(values_SE.amin(1, True), values_SE.amax(1, True), spec)


@RANGES.register("percentile")
@dataclass(frozen=True)
class Percentile(RangeSpec):
    """`percentile` (50 to 100) percent of the values are at most the upper end, as many at least the lower one.

    Nearest rank: an end is a value that occurs. Few elements make it min_max (1,000 needed for 99.9).
    """

    name: ClassVar[str] = "percentile"
    rows_apart: ClassVar[bool] = True

    percentile: float = 99.9

    def __post_init__(self) -> None:
        value = self.percentile
        if not isinstance(value, int | float) or isinstance(value, bool) or not 50 < value <= 100:
            raise UserError(f"percentile={value!r} is not possible: give a number above 50 and up to 100")

    def fit(self, values_SE: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        num = values_SE.shape[1]
        rank = ceil(round(self.percentile / 100 * num, 6))  # rounded: 99.9 % of 1000 is 999, not 999.0000000000001
        hi = values_SE.kthvalue(rank, 1, True).values
        lo = values_SE.kthvalue(num + 1 - rank, 1, True).values
        return range_grid(lo, hi, spec)
