"""From a float weight and its scheme to what a Variant stores.

Legend: O out_features, C in_features, r rank of the low-rank branch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.methods.quantizer import QuantizedWeight, dequantize_weight, quantize_weight, weight_grid
from viditq.quant.methods.rounding.adaround import row_errors
from viditq.quant.numerics.affine import usable_scale
from viditq.quant.numerics.low_rank import fit_low_rank
from viditq.quant.numerics.size import power_of_two


class FittedWeight(NamedTuple):
    """A weight behind its chain: in float, or as codes; up [O, r], down [r, C] of the branch beside the codes."""

    weight: Tensor | None
    quantized: QuantizedWeight | None
    up: Tensor | None = None
    down: Tensor | None = None


def fit_weight(weight_OC: Tensor, scheme: LayerScheme, moments_CC: Tensor | None, dtype: torch.dtype) -> FittedWeight:
    """weight_OC: behind the chain. moments_CC: likewise, where the rounding needs them. dtype: of the float layer."""
    if scheme.weight is None:
        return FittedWeight(weight_OC.to(dtype), None)
    weight_OC = weight_OC.detach().float()
    if scheme.low_rank is None and moments_CC is None:
        return FittedWeight(None, _rounded(weight_OC, scheme, scheme.weight, None))
    size = power_of_two(weight_OC.abs().amax())
    if moments_CC is not None:  # only what they say of inputs beside each other counts
        moments_CC = moments_CC.float() / power_of_two(moments_CC.diagonal().amax().float())
    return _multiplied(_fit_at_unit_size(weight_OC / size, scheme, scheme.weight, moments_CC, dtype), size)


def _rounded(rest_OC: Tensor, scheme: LayerScheme, spec: QuantSpec, moments_CC: Tensor | None) -> QuantizedWeight:
    return scheme.rounding.quantize(rest_OC, spec, weight_grid(rest_OC, spec, scheme.ranges), moments_CC)


def _fit_at_unit_size(
    weight_OC: Tensor, scheme: LayerScheme, spec: QuantSpec, moments_CC: Tensor | None, dtype: torch.dtype
) -> FittedWeight:
    if scheme.low_rank is None:
        return FittedWeight(None, _rounded(weight_OC, scheme, spec, moments_CC))

    def error(difference_OC: Tensor) -> Tensor:
        return difference_OC.square().sum() if moments_CC is None else row_errors(difference_OC, moments_CC).sum()

    def quantized(rest_OC: Tensor) -> Tensor:
        grid = weight_grid(rest_OC, spec, scheme.ranges)
        return dequantize_weight(quantize_weight(rest_OC, spec, grid), spec)

    branch_dtype = branch_dtype_of(dtype)
    up_Or, down_rC = fit_low_rank(weight_OC, scheme.low_rank, branch_dtype, quantized, error)
    kept = torch.float32 if dtype == torch.float32 else branch_dtype
    codes = _rounded(weight_OC - up_Or @ down_rC, scheme, spec, moments_CC)
    return FittedWeight(None, codes, up_Or.to(kept), down_rC.to(kept))


def _multiplied(fitted: FittedWeight, size: Tensor) -> FittedWeight:
    """That of `size` times the weight; size: a power of two, which the two factors of a branch share."""
    assert fitted.quantized is not None
    quantized = fitted.quantized._replace(scale=usable_scale(fitted.quantized.scale * size))
    if fitted.up is None or fitted.down is None:
        return FittedWeight(None, quantized)
    half = power_of_two(size.sqrt()) / 2
    return FittedWeight(None, quantized, fitted.up * half.to(fitted.up), fitted.down * (size / half).to(fitted.down))


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
