"""Round to nearest."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.registry import ROUNDINGS
from viditq.quant.description.specs import RoundingSpec
from viditq.quant.methods.quantizer import Grid, QuantizedWeight, quantize_weight


@ROUNDINGS.register("nearest")
@dataclass(frozen=True)
class Nearest(RoundingSpec):
    """Each weight on its own, half to even."""

    name: ClassVar[str] = "nearest"
    rows_apart: ClassVar[bool] = True

    def quantize(self, weight_OC: Tensor, spec: QuantSpec, grid: Grid, moments_CC: Any = None) -> QuantizedWeight:
        return quantize_weight(weight_OC, spec, grid)
