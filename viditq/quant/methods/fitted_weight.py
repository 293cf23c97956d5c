"""From a float weight and its scheme to what a Variant stores.

Legend: O out_features, C in_features, r rank of the low-rank branch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from viditq.mapped import in_pieces
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.methods.quantizer import QuantizedWeight, dequantize_weight, quantize_weight, weight_grid
from viditq.quant.methods.rounding.adaround import row_errors
from viditq.quant.methods.transforms.base import Chain
from viditq.quant.numerics.affine import usable_scale
from viditq.quant.numerics.float_grid import loaded_scale, stored_scale
from viditq.quant.numerics.low_rank import fit_low_rank
from viditq.quant.numerics.packing import pack
from viditq.quant.numerics.size import power_of_two


class FittedWeight(NamedTuple):
    """A weight behind its chain: in float, or as packed codes [O, B] with scale and zero point (of `QuantizedWeight`);
    up [O, r], down [r, C] of the branch beside the codes; tensor_scale as of `QuantizedWeight`."""

    weight: Tensor | None = None
    packed: Tensor | None = None
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None
    tensor_scale: Tensor | None = None


def fit_weight(
    weight_OC: Tensor,
    chain: Chain,
    scheme: LayerScheme,
    moments: Callable[[], Tensor] | None,
    dtype: torch.dtype,
) -> FittedWeight:
    """What is stored of a weight; in pieces of a few rows where rows have nothing to do with each other.

    weight_OC: before the chain, in whatever type its file has. moments: makes X^T X [C, C] of the chain's inputs, where
    the rounding needs them. dtype: in which the float layer would compute; a wider weight is rounded to it first.
    """
    if scheme.weight is None:
        weight_OC = weight_OC.detach().to(dtype)
        return FittedWeight(chain.weight(weight_OC.float()).to(dtype) if chain else weight_OC)
    if scheme.rows_apart and moments is None:
        return _fit_rows(weight_OC.detach(), chain, scheme, scheme.weight, dtype)
    behind_OC = chain.weight(weight_OC.detach().to(dtype).float())
    if scheme.low_rank is None and moments is None:
        return _packed(_rounded(behind_OC, scheme, scheme.weight, None), scheme.weight)
    size, moments_CC = power_of_two(behind_OC.abs().amax()), None
    if moments is not None:  # only what they say of inputs beside each other counts
        moments_CC = chain.moments(moments().to(behind_OC.device)).float()
        moments_CC = moments_CC / power_of_two(moments_CC.diagonal().amax())
    return _multiplied(
        _fit_at_unit_size(behind_OC / size, scheme, scheme.weight, moments_CC, dtype), size, scheme.weight
    )


def _fit_rows(
    weight_OC: Tensor, chain: Chain, scheme: LayerScheme, spec: QuantSpec, dtype: torch.dtype
) -> FittedWeight:
    """The same bits as of the whole weight at once, in a fiftieth of the memory and of the cache."""
    shapes = empty_fit(scheme, len(weight_OC), weight_OC.shape[1], dtype)[1:4]
    fields = [None if of is None else torch.empty_like(of, device=weight_OC.device) for of in shapes]
    start = 0
    for piece_nC in in_pieces(weight_OC):  # into what is there already: small parts that stay would riddle the heap
        part = _packed(_rounded(chain.weight(piece_nC.to(dtype).float()), scheme, spec, None), spec)
        for field, values in zip(fields, part[1:4], strict=True):
            if field is not None and values is not None:
                field[start : start + len(piece_nC)] = values
        start += len(piece_nC)
    return FittedWeight(None, *fields)


def _packed(quantized: QuantizedWeight, spec: QuantSpec) -> FittedWeight:
    packed, tensor_scale = pack(quantized.codes, spec.bits), quantized.tensor_scale
    return FittedWeight(None, packed, quantized.scale, quantized.zero_point, tensor_scale=tensor_scale)


def _rounded(rest_OC: Tensor, scheme: LayerScheme, spec: QuantSpec, moments_CC: Tensor | None) -> QuantizedWeight:
    return scheme.rounding.quantize(rest_OC, spec, weight_grid(rest_OC, spec, scheme.ranges), moments_CC)


def _fit_at_unit_size(
    weight_OC: Tensor, scheme: LayerScheme, spec: QuantSpec, moments_CC: Tensor | None, dtype: torch.dtype
) -> FittedWeight:
    if scheme.low_rank is None:
        return _packed(_rounded(weight_OC, scheme, spec, moments_CC), spec)

    def error(difference_OC: Tensor) -> Tensor:
        return difference_OC.square().sum() if moments_CC is None else row_errors(difference_OC, moments_CC).sum()

    def quantized(rest_OC: Tensor) -> Tensor:
        grid = weight_grid(rest_OC, spec, scheme.ranges)
        return dequantize_weight(quantize_weight(rest_OC, spec, grid), spec)

    branch_dtype = branch_dtype_of(dtype)
    up_Or, down_rC = fit_low_rank(weight_OC, scheme.low_rank, branch_dtype, quantized, error)
    kept = torch.float32 if dtype == torch.float32 else branch_dtype
    codes = _rounded(weight_OC - up_Or @ down_rC, scheme, spec, moments_CC)
    return _packed(codes, spec)._replace(up=up_Or.to(kept), down=down_rC.to(kept))


def _multiplied(fitted: FittedWeight, size: Tensor, spec: QuantSpec) -> FittedWeight:
    """That of `size` times the weight; size: a power of two, which the two factors of a branch share."""
    scale = fitted.scale
    assert scale is not None
    if fitted.tensor_scale is not None:
        fitted = fitted._replace(tensor_scale=usable_scale(fitted.tensor_scale * size))
    elif spec.block_scale is not None:
        multiplied = loaded_scale(scale, spec.block_scale, None) * size
        fitted = fitted._replace(scale=stored_scale(multiplied, spec.block_scale, None))
    else:
        fitted = fitted._replace(scale=usable_scale(scale * size))
    if fitted.up is None or fitted.down is None:
        return fitted
    half = power_of_two(size.sqrt()) / 2
    return fitted._replace(up=fitted.up * half.to(fitted.up), down=fitted.down * (size / half).to(fitted.down))


def empty_fit(scheme: LayerScheme, out_features: int, in_features: int, dtype: torch.dtype) -> FittedWeight:
    """The same shapes and types on the meta device."""
    alike = _empty_fit(scheme.weight, scheme.low_rank, out_features, in_features, dtype)
    return FittedWeight(*(None if part is None else torch.empty_like(part) for part in alike))


@lru_cache(maxsize=1024)  # quantizing without values takes milliseconds, and most layers are like another
def _empty_fit(
    spec: QuantSpec | None, rank: int | None, out_features: int, in_features: int, dtype: torch.dtype
) -> FittedWeight:
    weight_OC = torch.empty(out_features, in_features, dtype=dtype, device="meta")
    if spec is None:
        return FittedWeight(weight_OC)
    fitted = _packed(quantize_weight(weight_OC, spec), spec)
    if rank is None:
        return fitted
    return fitted._replace(up=weight_OC.new_empty(out_features, rank), down=weight_OC.new_empty(rank, in_features))


def branch_dtype_of(dtype: torch.dtype) -> torch.dtype:
    """The 16 bits of a low-rank branch: the layer's own, or float16 where it computes in float32."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16
