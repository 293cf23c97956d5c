"""Round to nearest on the min-max grid."""

from torch import Tensor

from viditq.quant.quantizer import QuantizedWeight, quantize_weight
from viditq.quant.registry import ROUNDINGS
from viditq.quant.scheme import QuantSpec


@ROUNDINGS.register("nearest")
def nearest(weight_OC: Tensor, spec: QuantSpec) -> QuantizedWeight:
    """Codes and grid of a weight [O, C] that has been through its transforms."""
    return quantize_weight(weight_OC, spec)
