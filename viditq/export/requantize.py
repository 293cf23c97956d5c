"""Layers that a program's formats cannot hold, quantized again: 8 bits by row, symmetric, behind ConvRot's rotation."""

from __future__ import annotations

from collections.abc import Sequence

from viditq.export.float_weights import FloatWeights
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.execution.variant import Variant
from viditq.quant.methods.quantizer import QuantizedWeight
from viditq.quant.methods.transforms import Chain, ConvRotSpec

WEIGHT, ACTIVATION = QuantSpec(8, True, "channel"), QuantSpec(8, True, "token", dynamic=True)
SMALLEST_GROUP = 16


def scheme_again(schemes: Sequence[LayerScheme], in_features: int) -> LayerScheme:
    """For layers that lie in one tensor, of which these are quantized; activations stay in float where theirs do."""
    if all(scheme.activation is None for scheme in schemes):
        return LayerScheme(WEIGHT, None)
    rotation = (ConvRotSpec(),) if in_features % SMALLEST_GROUP == 0 else ()
    return LayerScheme(WEIGHT, ACTIVATION, rotation)


def variant_again(weights: FloatWeights, layer: str, scheme: LayerScheme) -> Variant:
    """The layer in its new codes."""
    weight_OC = weights.of(layer)
    chain = Chain([transform.fit(weight_OC, None, scheme) for transform in scheme.transforms])
    return Variant.fit(scheme, weight_OC, chain)


def quantized_again(weights: FloatWeights, layer: str, scheme: LayerScheme) -> QuantizedWeight:
    """Its codes and scales."""
    quantized = variant_again(weights, layer, scheme).quantized_weight()
    assert quantized is not None
    return quantized
