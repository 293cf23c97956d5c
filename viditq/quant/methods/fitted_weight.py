"""From a float weight and its scheme to what a Variant stores.

Legend: O out_features, C in_features, r rank of the low-rank branch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from viditq.quant.description.scheme import LayerScheme
from viditq.quant.methods.quantizer import QuantizedWeight, dequantize_weight, quantize_weight, weight_grid
from viditq.quant.methods.rounding.adaround import row_errors
from viditq.quant.numerics.low_rank import fit_low_rank


class FittedWeight(NamedTuple):
    """A weight behind its chain: in float, or as codes; up [O, r], down [r, C] of the branch beside the codes."""

    weight: Tensor | None
    quantized: QuantizedWeight | None
    up: Tensor | None = None
    down: Tensor | None = None


def fit_weight(weight_OC: Tensor, scheme: LayerScheme, moments_CC: Tensor | None, dtype: torch.dtype) -> FittedWeight:
    """weight_OC: behind the chain. moments_CC: likewise, where the rounding needs them. dtype: of the float layer."""
    spec = scheme.weight
    if spec is None:
        return FittedWeight(weight_OC.to(dtype), None)

    def codes(rest_OC: Tensor) -> QuantizedWeight:
        return scheme.rounding.quantize(rest_OC, spec, weight_grid(rest_OC, spec, scheme.ranges), moments_CC)

    weight_OC = weight_OC.detach().float()
    if scheme.low_rank is None:
        return FittedWeight(None, codes(weight_OC))

    def error(difference_OC: Tensor) -> Tensor:
        return (
            difference_OC.square().sum() if moments_CC is None else row_errors(difference_OC, moments_CC.float()).sum()
        )

    def quantized(rest_OC: Tensor) -> Tensor:
        grid = weight_grid(rest_OC, spec, scheme.ranges)
        return dequantize_weight(quantize_weight(rest_OC, spec, grid), spec)

    branch_dtype = branch_dtype_of(dtype)
    up_Or, down_rC = fit_low_rank(weight_OC, scheme.low_rank, branch_dtype, quantized, error)
    kept = torch.float32 if dtype == torch.float32 else branch_dtype
    return FittedWeight(None, codes(weight_OC - up_Or @ down_rC), up_Or.to(kept), down_rC.to(kept))


def empty_fit(scheme: LayerScheme, out_features: int, in_features: int, dtype: torch.dtype) -> FittedWeight:
    """The same shapes and types on the meta device."""
    weight_OC = torch.empty(out_features, in_features, dtype=dtype, device="meta")
    if scheme.weight is None:
        return FittedWeight(weight_OC, None)
    quantized, rank = quantize_weight(weight_OC, scheme.weight), scheme.low_rank
    if rank is None:
        return FittedWeight(None, quantized)
    up_Or, down_rC = weight_OC.new_empty(out_features, rank), weight_OC.new_empty(rank, in_features)
    return FittedWeight(None, quantized, up_Or, down_rC)


def branch_dtype_of(dtype: torch.dtype) -> torch.dtype:
    """The 16 bits of a low-rank branch: the layer's own, or float16 where it computes in float32."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16
