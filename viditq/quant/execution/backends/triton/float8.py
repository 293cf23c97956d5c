"""The kernels of FP8 as operators of torch: `torch.ops.viditq.float8_quantize` and `triton_float8_multiply`.

As those of `ops`: one node of a graph each, safe in CUDA graphs. Legend as in `float8_kernels`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from viditq.quant.execution.backends.triton import ops
from viditq.quant.execution.backends.triton.tiles import LARGEST_INNER, Tile, float8_tiles_for, power_of_two

SHORTEST_INNER = 32  # of one-byte numbers, for the instructions
QUANTIZE = (
    "(Tensor x, int padded, ScalarType dtype, float eps, Tensor? mul, Tensor? add, Tensor? div, Tensor? scale) "
    "-> (Tensor, Tensor)"
)
MULTIPLY = (
    "(Tensor codes, Tensor scale, Tensor weight, Tensor weight_scale, int outs, Tensor? bias, Tensor? addend, "
    "int activation, Tensor? gate, Tensor? residual, ScalarType dtype, int[] tile) -> Tensor"
)


@cache
def installed() -> bool:
    """Whether triton is there, without importing it."""
    return find_spec("triton") is not None


@cache
def load() -> Any:
    """The kernels' module, with the operators defined; raises ImportError without triton."""
    from viditq.quant.execution.backends.triton import float8_kernels

    for name, schema, run, shapes in (
        ("float8_quantize", QUANTIZE, _quantize, _quantized_shapes),
        ("triton_float8_multiply", MULTIPLY, _multiply, _product_shape),
    ):
        ops.define(name, schema, run, shapes)
    return float8_kernels


def quantize(
    x: Tensor,
    padded: int,
    dtype: torch.dtype,
    *,
    eps: float | None = None,
    mul: Tensor | None = None,
    add: Tensor | None = None,
    div: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Codes [M, padded] of (layernorm(x) * mul + add) / div in `dtype`, torch's FP8, and their scale float32 [M, 1].

    x: [..., C] of any floating type; every part that is None is left out. eps: of a LayerNorm without weight and bias.
    mul, add: [lines, C], as in `surroundings`. div: [C]. scale: float32, one or one for each sample, where rows do not
    find their own; one stays one: [1, 1]. `load` comes first.
    """
    if mul is not None and add is not None and len(mul) != len(add):
        mul, add = torch.broadcast_tensors(mul, add)
    codes, found = torch.ops.viditq.float8_quantize(
        x, padded, dtype, -1.0 if eps is None else eps, ops.whole(mul), ops.whole(add), ops.whole(div), ops.whole(scale)
    )
    if scale is None:
        return codes, found
    return codes, scale.view(-1, 1).repeat_interleave(1 if scale.numel() == 1 else len(codes) // scale.numel(), 0)


def multiply(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    outs: int,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    addend: Tensor | None = None,
    activation: int = 0,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """residual + gate * activation(scale weight_scale codes weight^T + bias + addend) as [M, outs] in `dtype`.

    Only the end is rounded to it. codes: [M, Q], weight: [at least outs, Q], torch's FP8. scale, weight_scale: one, or
    one for each row and output. The rest as in `ops.arguments`; tile: None = the first of `float8_tiles_for`.
    """
    return torch.ops.viditq.triton_float8_multiply(
        codes, ops.whole(scale), weight, ops.whole(weight_scale), outs, ops.whole(bias), ops.as_rows(addend),
        activation, ops.whole(gate), ops.as_rows(residual), dtype, list(tile or ()),
    )  # fmt: skip


def _quantized_shapes(x: Tensor, padded: int, dtype: torch.dtype, *rest: Any) -> tuple[Tensor, Tensor]:
    rows = math.prod(x.shape[:-1])
    found = 0 if rest[-1] is not None else rows
    return x.new_empty((rows, padded), dtype=dtype), x.new_empty((found, 1), dtype=torch.float32)


def _product_shape(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, outs: int, bias: Tensor | None,
    addend: Tensor | None, activation: int, gate: Tensor | None, residual: Tensor | None, dtype: torch.dtype,
    tile: Sequence[int],
) -> Tensor:  # fmt: skip
    return codes.new_empty((len(codes), outs), dtype=dtype)


def _quantize(
    x: Tensor, padded: int, dtype: torch.dtype, eps: float, mul: Tensor | None, add: Tensor | None, div: Tensor | None,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    width, number = x.shape[-1], torch.finfo(dtype)
    rows_MC = x.reshape(-1, width)
    rows_MC = rows_MC if rows_MC.stride(-1) == 1 else rows_MC.contiguous()
    num_rows, block = len(rows_MC), power_of_two(padded)
    codes, found = _quantized_shapes(x, padded, dtype, scale)
    if num_rows == 0:
        return codes, found
    lines = next((len(one) for one in (mul, add) if one is not None), 1)
    most, each = ops.ROW_WARPS
    with ops.launched_on(x):
        load().quantize_float8_rows[(num_rows,)](
            rows_MC, codes.view(torch.uint8), found, div, mul, add, scale, rows_MC.stride(0), num_rows // lines,
            num_rows // (1 if scale is None else scale.numel()), width, padded, max(eps, 0.0),
            LARGEST=number.max, BIAS=1 - round(math.log2(number.smallest_normal)),
            MANTISSA=-round(math.log2(number.eps)), NORM=eps >= 0, HAS_MUL=mul is not None, HAS_ADD=add is not None,
            HAS_DIV=div is not None, GIVEN=scale is not None, BLOCK=block,
            num_warps=min(max(block // each, 1), most), enable_fp_fusion=False,
        )  # fmt: skip
    return codes, found


def _multiply(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, outs: int, bias: Tensor | None,
    addend: Tensor | None, activation: int, gate: Tensor | None, residual: Tensor | None, dtype: torch.dtype,
    tile: Sequence[int],
) -> Tensor:  # fmt: skip
    num_rows, padded = codes.shape
    out = codes.new_empty((num_rows, outs), dtype=dtype)
    if num_rows == 0:
        return out
    cut = Tile(*tile) if tile else float8_tiles_for(num_rows)[0]
    inner = min(max(power_of_two(padded), SHORTEST_INNER), LARGEST_INNER)
    with ops.launched_on(codes):
        load().multiply_float8[(-(-num_rows // cut.rows) * -(-outs // cut.outs),)](
            codes, scale, weight, weight_scale, bias, addend, gate, residual, out, num_rows, outs, padded,
            num_rows // (1 if gate is None else len(gate)),
            A_SCALE_A_ROW=int(scale.numel() > 1), A_SCALE_AN_OUTPUT=int(weight_scale.numel() > 1),
            HAS_BIAS=bias is not None, HAS_ADDEND=addend is not None, HAS_GATE=gate is not None,
            HAS_RESIDUAL=residual is not None, ACTIVATION=activation, WHOLE=padded % inner == 0,
            BLOCK_M=cut.rows, BLOCK_O=cut.outs, BLOCK_K=inner, GROUP=ops.GROUP,
            num_warps=cut.warps, num_stages=cut.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out
