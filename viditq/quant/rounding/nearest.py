"""Round to nearest."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from viditq.quant.quantizer import Grid, QuantizedWeight, quantize_weight
from viditq.quant.registry import ROUNDINGS
from viditq.quant.scheme import QuantSpec
from viditq.quant.specs import RoundingSpec


@ROUNDINGS.register("nearest")
@dataclass(frozen=True)
class Nearest(RoundingSpec):
    """Each weight on its own, half to even."""

    name: ClassVar[str] = "nearest"

    def quantize(self, weight_OC: Tensor, spec: QuantSpec, grid: Grid, moments_CC: Any = None) -> QuantizedWeight:
        return quantize_weight(weight_OC, spec, grid)
