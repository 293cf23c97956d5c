"""Weights in codes, activations in float: each weight is decoded while its layer is called, and let go of.

Legend: n rows of a weight, C in_features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from viditq.quant.description.registry import BACKENDS
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.execution.backends.base import Backend
from viditq.quant.execution.variant import Variant
from viditq.quant.methods.quantizer import QuantizedWeight, dequantize_weight
from viditq.quant.numerics.packing import unpack

PIECE_WEIGHTS = 2**18  # decoded at once in float32: what is made of them stays in the cache


@BACKENDS.register("weight_only")
class WeightOnlyBackend(Backend):
    """Equal to `fake` to the bit, and of a model's weights only one layer's is ever decoded."""

    name = "weight_only"

    def unsupported_field(self, scheme: LayerScheme) -> str | None:
        return "activation" if scheme.activation is not None else None

    def prepare(self, variant: Variant) -> None:
        """Nothing: the codes stay as they are stored."""

    @torch.no_grad()
    def linear(self, variant: Variant, x: Tensor, bias: Tensor | None) -> Tensor:
        y = variant.chain.activation(x).to(variant.dtype)
        branch: Tensor | None = None
        if variant.low_rank_up is not None:
            branch = F.linear(F.linear(y, variant.low_rank_down), variant.low_rank_up)
        out = F.linear(y, decoded(variant), bias)
        return out if branch is None else out.add_(branch)


def decoded(variant: Variant) -> Tensor:
    """`Variant.dequantized_weight` of a weight in codes without float32 copies of it all, [O, C] in its dtype."""
    packed, spec = variant.qweight, variant.scheme.weight
    if packed is None or spec is None:
        return variant.dequantized_weight()
    rows = max(PIECE_WEIGHTS // variant.in_features, 1)
    weight_OC = torch.empty(len(packed), variant.in_features, dtype=variant.dtype, device=packed.device)
    for start in range(0, len(packed), rows):
        piece = slice(start, start + rows)
        scale, zero_point = (
            grid if grid is None or len(grid) == 1 else grid[piece]
            for grid in (variant.weight_scale, variant.weight_zero_point)
        )
        assert scale is not None
        codes_nC = unpack(packed[piece], spec.bits, variant.in_features)
        weight_OC[piece] = dequantize_weight(
            QuantizedWeight(codes_nC, scale, zero_point, variant.weight_tensor_scale), spec
        )
    return weight_OC
