"""The kernels as operators of torch: `torch.ops.viditq.triton_quantize` and `triton_multiply`.

Each is one node of a graph under torch.compile, launches on the current stream and asks the device for nothing, so that
CUDA graphs record it. Legend as in `kernels`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.quant.execution.backends.triton.tiles import Tile, inner_block, power_of_two, tile_for

GROUP = 8  # tiles below each other that share columns in the cache
ROW_WARPS = 16, 1024  # at most, and elements that one of them takes
Parts = tuple[Tensor, Tensor, Tensor, Tensor]
QUANTIZE = (
    "(Tensor x, int segments, int padded, int ranges, int bits, bool symmetric, float eps, Tensor? mul, Tensor? add, "
    "Tensor? div, Tensor? scale, Tensor? zero_point) -> (Tensor, Tensor, Tensor, Tensor)"
)
MULTIPLY = (
    "(Tensor codes, Tensor scale, Tensor zero, Tensor rowsum, bool symmetric, Tensor weight, Tensor weight_scale, "
    "Tensor? weight_zero, Tensor colsum, int size, Tensor? bias, Tensor? addend, int activation, Tensor? gate, "
    "Tensor? residual, ScalarType dtype, int[] tile) -> Tensor"
)


class Quantized(NamedTuple):
    """Rows: codes int8 [S, M, h], scale float32 [M, R], zero int32 [M, R] (0: symmetric), rowsum int32 [M, S]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    rowsum: Tensor
    symmetric: bool


@cache
def load() -> Any:
    """The kernels' module, with the operators defined; raises ImportError without triton."""
    from viditq.quant.execution.backends.triton import kernels

    for name, schema, run, shapes in (
        ("triton_quantize", QUANTIZE, _quantize, _quantized_shapes),
        ("triton_multiply", MULTIPLY, _multiply, product_shape),
    ):
        define(name, schema, run, shapes)
    return kernels


def define(name: str, schema: str, run: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """An operator of torch that launches on the current stream, with its shapes described for torch.compile."""
    torch.library.define(f"viditq::{name}", schema)
    torch.library.impl(f"viditq::{name}", ("cpu", "cuda"), run)
    torch.library.register_fake(f"viditq::{name}", shapes)


def interpreted() -> bool:
    """Whether the kernels run on a CPU; raises ImportError without triton."""
    from viditq.quant.execution.backends.triton import kernels

    return kernels.interpreted()


def quantize(
    x: Tensor,
    size: int,
    padded: int,
    ranges: int,
    bits: int,
    symmetric: bool,
    *,
    eps: float | None = None,
    mul: Tensor | None = None,
    add: Tensor | None = None,
    div: Tensor | None = None,
    grid: tuple[Tensor, Tensor] | None = None,
) -> Quantized:
    """Codes of (layernorm(x) * mul + add) / div, x [..., C] of any floating type; every part that is None is left out.

    size, padded: g and h. ranges: R. eps: of a LayerNorm without weight and bias. mul, add: [lines, C], as in
    `surroundings`. div: [C]. grid: scale and zero point float32, [R] or [samples, R], where rows do not find their
    own. `load` comes first.
    """
    scale, zero_point = grid or (None, None)
    if mul is not None and add is not None and len(mul) != len(add):
        mul, add = torch.broadcast_tensors(mul, add)
    parts = torch.ops.viditq.triton_quantize(
        x, x.shape[-1] // size, padded, ranges, bits, symmetric, -1.0 if eps is None else eps, whole(mul), whole(add),
        whole(div), whole(scale), whole(zero_point),
    )  # fmt: skip
    codes, steps, zero, rowsum = parts
    return Quantized(codes, steps, zero, rowsum, symmetric)


def arguments(
    x: Quantized,
    weight: Any,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    addend: Tensor | None = None,
    activation: int = 0,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Any, ...]:
    """Of the operators that multiply: residual + gate * activation(Q(x) Q(w)^T + bias + addend) as [M, O] in `dtype`.

    Only the end is rounded to it. weight: a SignedWeight. addend, residual: [..., O], M rows. gate: [lines, O].
    activation: index of `surroundings.ACTIVATIONS`.
    """
    around = as_rows(addend), activation, whole(gate), as_rows(residual)
    return (*x, *weight[:4], weight.size, whole(bias), *around, dtype)


def multiply(*args: Any, tile: Tile | None = None, **kwargs: Any) -> Tensor:
    """What `arguments` describes, by our kernel; tile: None = that of `tile_for`."""
    return torch.ops.viditq.triton_multiply(*arguments(*args, **kwargs), list(tile or ()))


def whole(tensor: Tensor | None) -> Tensor | None:
    """Its elements one after another."""
    return None if tensor is None else tensor.contiguous()


def as_rows(tensor: Tensor | None) -> Tensor | None:
    """[..., O] -> [M, O], one after another."""
    return None if tensor is None else tensor.reshape(-1, tensor.shape[-1]).contiguous()


def _quantized_shapes(x: Tensor, segments: int, padded: int, ranges: int, *rest: Any) -> Parts:
    rows = math.prod(x.shape[:-1])
    return (
        x.new_empty((segments, rows, padded), dtype=torch.int8),
        x.new_empty((rows, ranges), dtype=torch.float32),
        x.new_empty((rows, ranges), dtype=torch.int32),
        x.new_empty((rows, segments), dtype=torch.int32),
    )


def product_shape(
    codes: Tensor, scale: Tensor, zero: Tensor, rowsum: Tensor, symmetric: bool, weight: Tensor, weight_scale: Tensor,
    *rest: Any,
) -> Tensor:  # fmt: skip
    """An empty one like what the operators that multiply give."""
    return codes.new_empty(
        (codes.shape[1], weight_scale.shape[1]), dtype=next(one for one in rest if isinstance(one, torch.dtype))
    )


def _quantize(
    x: Tensor, segments: int, padded: int, ranges: int, bits: int, symmetric: bool, eps: float, mul: Tensor | None,
    add: Tensor | None, div: Tensor | None, scale: Tensor | None, zero_point: Tensor | None,
) -> Parts:  # fmt: skip
    width = x.shape[-1]
    rows_MC = x.reshape(-1, width)
    rows_MC = rows_MC if rows_MC.stride(-1) == 1 else rows_MC.contiguous()
    num_rows = len(rows_MC)
    out = _quantized_shapes(x, segments, padded, ranges)
    if num_rows == 0:
        return out
    blocks = [power_of_two(n) for n in (ranges, segments // ranges, padded)]
    half = 2 ** (bits - 1)
    low, high = (-half, half - 1) if symmetric else (0, 2**bits - 1)
    lines = next((len(one) for one in (mul, add) if one is not None), 1)
    samples = 1 if scale is None else scale.numel() // ranges
    most, each = ROW_WARPS
    with launched_on(x):
        load().quantize_rows[(num_rows,)](
            rows_MC, *out, div, mul, add, scale, zero_point, rows_MC.stride(0), num_rows // lines,
            num_rows // samples, num_rows, ranges, segments // ranges, width // segments, padded, max(eps, 0.0),
            float(high) if symmetric else high / 2,
            LOW=low, HIGH=high, SHIFT=0 if symmetric else half, SYMMETRIC=symmetric, NORM=eps >= 0,
            HAS_MUL=mul is not None, HAS_ADD=add is not None, HAS_DIV=div is not None, GIVEN=scale is not None,
            BLOCK_R=blocks[0], BLOCK_P=blocks[1], BLOCK_G=blocks[2],
            num_warps=min(max(power_of_two(math.prod(blocks)) // each, 1), most), enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _multiply(
    codes: Tensor, scale: Tensor, zero: Tensor, rowsum: Tensor, symmetric: bool, weight: Tensor, weight_scale: Tensor,
    weight_zero: Tensor | None, colsum: Tensor, size: int, bias: Tensor | None, addend: Tensor | None, activation: int,
    gate: Tensor | None, residual: Tensor | None, dtype: torch.dtype, tile: Sequence[int],
) -> Tensor:  # fmt: skip
    (segments, num_rows, padded), num_outs = codes.shape, weight_scale.shape[1]
    out = codes.new_empty((num_rows, num_outs), dtype=dtype)
    if num_rows == 0:
        return out
    cut, inner, packed = Tile(*tile) if tile else tile_for(num_rows), inner_block(padded), weight.dtype == torch.uint8
    tiles = -(-num_rows // cut.rows) * -(-num_outs // cut.outs)
    with launched_on(codes):
        load().multiply[(tiles,)](
            codes, scale, zero, rowsum, weight, weight_scale, weight_zero, colsum, bias, addend, gate, residual, out,
            num_rows, num_outs, size, padded, weight.shape[-1], num_rows // (1 if gate is None else len(gate)),
            SEGMENTS=segments, RANGES=scale.shape[1], STEPS=padded // inner if segments > 1 else 0,
            PACKED=packed, HAS_ZERO=not symmetric, HAS_WEIGHT_ZERO=weight_zero is not None,
            HAS_BIAS=bias is not None, HAS_ADDEND=addend is not None, HAS_GATE=gate is not None,
            HAS_RESIDUAL=residual is not None, ACTIVATION=activation,
            BLOCK_M=cut.rows, BLOCK_O=cut.outs, BLOCK_K=inner, BYTES=inner // 2 if packed else inner,
            GROUP=GROUP, num_warps=cut.warps, num_stages=cut.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def launched_on(tensor: Tensor) -> Any:
    """Its device as the current one, where triton launches; raises UserError for a CPU without the interpreter."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    if not interpreted():
        raise UserError(
            "backend triton multiplies on a GPU, and the model lies on the CPU: move it (pipeline.to('cuda')), or "
            "choose backend=auto"
        )
    return contextlib.nullcontext()
