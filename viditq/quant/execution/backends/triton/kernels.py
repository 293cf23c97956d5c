# mypy: ignore-errors
"""The kernels, imported only where triton is. Under TRITON_INTERPRET=1 they run on a CPU.

Legend: M rows, C in_features, O out_features, S segments of C that share all scales, g = C / S, h = g padded, R ranges
of a row, P = S / R. Codes are s8: of activations code - 2^(bits - 1), of weights as `signed` has them.
"""

from typing import Any

import triton
import triton.language as tl

EMPTY_SCALE = tl.constexpr(1e-6)  # numerics.affine
LARGEST = tl.constexpr(3.4028234663852886e38)
HALF_EVEN = tl.constexpr(12582912.0)  # 1.5 x 2^23: adding and subtracting it rounds to a whole number, ties to even
FAR = tl.constexpr(1048576.0)  # beyond every code; where that trick still holds


def interpreted() -> bool:
    """Whether triton runs them on a CPU, in numpy (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


def assemblers(arch: int) -> tuple[Any, Any]:
    """NVIDIA's assembler that triton takes for such a GPU (90: sm_90), and the newer one that it brings."""
    from triton.backends.nvidia.compiler import get_ptxas

    return get_ptxas(arch), triton.knobs.nvidia.ptxas_blackwell


@triton.jit
def prepared(
    x, div, mul, add, row, column, inside, width, x_stride, rows_a_line, eps,
    NORM: tl.constexpr, HAS_MUL: tl.constexpr, HAS_ADD: tl.constexpr, HAS_DIV: tl.constexpr,
):  # fmt: skip
    """(layernorm(x) * mul + add) / div of one row in float32, at `column`; 0 where it is not `inside`."""
    t = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        t = tl.where(inside, t - tl.sum(t) / width, 0.0)
        t = t / tl.sqrt(tl.sum(t * t) / width + eps)
    line = row // rows_a_line * width
    if HAS_MUL:
        t = t * tl.load(mul + line + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_ADD:
        t = t + tl.load(add + line + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_DIV:
        t = tl.div_rn(t, tl.load(div + column, mask=inside, other=1.0).to(tl.float32))
    return t


@triton.jit
def quantize_rows(
    x,  # [M, C], any float
    codes,  # int8 [S, M, h]
    scale,  # float32 [M, R]
    zero,  # int32 [M, R]
    rowsum,  # int32 [M, S], of the codes
    div,  # [C]
    mul,  # [lines, C]
    add,  # [lines, C]
    given_scale,  # [samples, R]
    given_zero,  # [samples, R], counted as affine does
    x_stride,
    rows_a_line,  # of mul and add
    rows_a_sample,  # of the given grid
    num_rows,
    num_ranges,
    parts,
    size,
    padded,
    eps,
    steps,  # of a symmetric grid its largest code, else half of it
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SHIFT: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    NORM: tl.constexpr,
    HAS_MUL: tl.constexpr,
    HAS_ADD: tl.constexpr,
    HAS_DIV: tl.constexpr,
    GIVEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Of one row: ((layernorm(x) * mul + add) / div) as codes, their scales, zero points and sums."""
    row = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)[:, None, None]
    p = tl.arange(0, BLOCK_P)[None, :, None]
    j = tl.arange(0, BLOCK_G)[None, None, :]
    segments, width = num_ranges * parts, num_ranges * parts * size
    inside = (r < num_ranges) & (p < parts) & (j < size)
    column = (r * parts + p) * size + j
    t = prepared(
        x, div, mul, add, row, column, inside, width, x_stride, rows_a_line, eps, NORM, HAS_MUL, HAS_ADD, HAS_DIV
    )
    ranges = tl.arange(0, BLOCK_R)
    if GIVEN:
        at = row // rows_a_sample * num_ranges + ranges
        step = tl.load(given_scale + at, mask=ranges < num_ranges, other=1.0)
        offset = tl.load(given_zero + at, mask=ranges < num_ranges, other=0.0)
    else:
        low = tl.min(tl.min(t, 2), 1)
        high = tl.max(tl.max(t, 2), 1)
        if SYMMETRIC:
            span = tl.maximum(-low, high)
        else:
            low = tl.minimum(low, 0.0)
            span = tl.maximum(high, 0.0) * 0.5 - low * 0.5
        step = tl.div_rn(span, tl.zeros_like(span) + steps)
        step = tl.where(step <= 0.0, EMPTY_SCALE, step)
        offset = tl.zeros_like(step)
        if not SYMMETRIC:
            offset = (tl.div_rn(-low, step) + HALF_EVEN) - HALF_EVEN
    spoilt = tl.max(tl.max((t != t).to(tl.int32), 2), 1) > 0  # maxima pass over NaN on a GPU
    spoilt = spoilt | (step != step) | (tl.abs(step) > LARGEST)
    wide = tl.expand_dims(tl.expand_dims(step, 1), 2)
    t = tl.div_rn(t, wide + tl.zeros_like(t))
    t = tl.minimum(tl.maximum(t, -FAR), FAR)
    t = ((t + HALF_EVEN) - HALF_EVEN) + tl.expand_dims(tl.expand_dims(offset, 1), 2)
    t = tl.minimum(tl.maximum(t, LOW * 1.0), HIGH * 1.0) - SHIFT
    usable = inside & (tl.expand_dims(tl.expand_dims(spoilt, 1), 2) == 0)
    code = tl.where(usable, t, 0.0).to(tl.int32)
    kept = (r < num_ranges) & (p < parts) & (j < padded)
    place = ((r * parts + p) * num_rows + row) * padded + j
    tl.store(codes + place, code.to(tl.int8), mask=kept)
    sums = tl.sum(code, 2)
    segment = ranges[:, None] * parts + tl.arange(0, BLOCK_P)[None, :]
    there = (ranges[:, None] < num_ranges) & (tl.arange(0, BLOCK_P)[None, :] < parts)
    tl.store(rowsum + row * segments + segment, sums, mask=there)
    at = row * num_ranges + ranges
    tl.store(scale + at, tl.where(spoilt, float("nan"), step), mask=ranges < num_ranges)
    offset = tl.where(spoilt, 0.0, offset) - SHIFT
    tl.store(zero + at, offset.to(tl.int32), mask=ranges < num_ranges)


@triton.jit
def activated(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:  # gelu_tanh: (1 + tanh u) / 2 = sigmoid(2 u)
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    if ACTIVATION == 2:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    if ACTIVATION == 3:
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def tile_of(num_rows, num_outs, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, GROUP: tl.constexpr):
    """Rows and outputs of this program's tile."""
    pid = tl.program_id(0)
    across = tl.cdiv(num_outs, BLOCK_O)
    first = pid // (GROUP * across) * GROUP  # GROUP tiles below each other share a column's weights in the cache
    rows_here = tl.minimum(tl.cdiv(num_rows, BLOCK_M) - first, GROUP)
    tile_m = first + pid % (GROUP * across) % rows_here
    tile_o = pid % (GROUP * across) // rows_here
    m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o = (tile_o * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    return m, o


@triton.jit
def finish(
    total, m, o, bias, addend, gate, residual, out, num_rows, num_outs, rows_a_line,
    HAS_BIAS: tl.constexpr, HAS_ADDEND: tl.constexpr, HAS_GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Stores residual + gate * activation(total + bias + addend), rounded at the end alone."""
    in_rows, in_outs = m < num_rows, o < num_outs
    if HAS_BIAS:
        total += tl.load(bias + o, mask=in_outs, other=0.0).to(tl.float32)[None, :]
    inside = in_rows[:, None] & in_outs[None, :]
    at = m[:, None] * num_outs + o[None, :]
    if HAS_ADDEND:
        total += tl.load(addend + at, mask=inside, other=0.0).to(tl.float32)
    total = activated(total, ACTIVATION)
    if HAS_GATE:
        line = m[:, None] // rows_a_line
        total *= tl.load(gate + line * num_outs + o[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dequantized(
    acc, s, m, o, in_rows, in_outs, scale, zero, rowsum, weight_scale, weight_zero, colsum, num_outs, size,
    SEGMENTS: tl.constexpr, RANGES: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_WEIGHT_ZERO: tl.constexpr,
):  # fmt: skip
    """What segment `s` adds: the exact sum of (x - zero)(w - weight_zero), times both scales, in float32."""
    at = m * RANGES + s // (SEGMENTS // RANGES)
    if HAS_ZERO:
        row_zero = tl.load(zero + at, mask=in_rows, other=0)
        column_sum = tl.load(colsum + s * num_outs + o, mask=in_outs, other=0).to(tl.int32)
        acc -= row_zero[:, None] * column_sum[None, :]
    if HAS_WEIGHT_ZERO:
        rest = tl.load(rowsum + m * SEGMENTS + s, mask=in_rows, other=0)
        if HAS_ZERO:
            rest -= row_zero * size
        column_zero = tl.load(weight_zero + s * num_outs + o, mask=in_outs, other=0).to(tl.int32)
        acc -= rest[:, None] * column_zero[None, :]
    row_scale = tl.load(scale + at, mask=in_rows, other=0.0)
    column_scale = tl.load(weight_scale + s * num_outs + o, mask=in_outs, other=0.0)
    return acc.to(tl.float32) * (row_scale[:, None] * column_scale[None, :])


@triton.jit
def multiply(
    codes,  # int8 [S, M, h]
    scale,  # float32 [M, R]
    zero,  # int32 [M, R]
    rowsum,  # int32 [M, S]
    weight,  # int8 [S, O, h], or uint8 [S, O, h / 2]: of two neighbours the first in the low nibble
    weight_scale,  # float32 [S, O]
    weight_zero,  # int8 [S, O]
    colsum,  # int16 or int32 [S, O]
    bias,  # [O]
    addend,  # [M, O]
    gate,  # [lines, O]
    residual,  # [M, O]
    out,  # [M, O]
    num_rows,
    num_outs,
    size,
    padded,
    bytes_a_row,  # of a segment's weights; given, as half of `padded` is not known to be a multiple of 16
    rows_a_line,
    SEGMENTS: tl.constexpr,
    RANGES: tl.constexpr,
    STEPS: tl.constexpr,  # blocks of a segment where there are several segments
    PACKED: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_WEIGHT_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BYTES: tl.constexpr,  # of BLOCK_K weights
    GROUP: tl.constexpr,
):
    """residual + gate * activation(dequantized(codes weight^T) + bias + addend), one tile [BLOCK_M, BLOCK_O] of it."""
    m, o = tile_of(num_rows, num_outs, BLOCK_M, BLOCK_O, GROUP)
    in_rows, in_outs = m < num_rows, o < num_outs
    k = tl.arange(0, BLOCK_K)
    mine = codes + m[:, None] * padded + k[None, :]
    theirs = weight + o[:, None] * bytes_a_row + tl.arange(0, BYTES)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.int32)
    total = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for i in range(0, SEGMENTS * padded // BLOCK_K):
        a = tl.load(mine, mask=in_rows[:, None], other=0)
        b = tl.load(theirs, mask=in_outs[:, None], other=0)
        mine += BLOCK_K
        theirs += BYTES
        if PACKED:
            b = tl.interleave((b & 15).to(tl.int8), (b >> 4).to(tl.int8))
        acc = tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)
        if SEGMENTS > 1 and (i + 1) % STEPS == 0:
            total += _dequantized(
                acc, i // STEPS, m, o, in_rows, in_outs, scale, zero, rowsum, weight_scale, weight_zero, colsum,
                num_outs, size, SEGMENTS, RANGES, HAS_ZERO, HAS_WEIGHT_ZERO,
            )  # fmt: skip
            acc = tl.zeros((BLOCK_M, BLOCK_O), tl.int32)
            mine += (num_rows - 1) * padded  # to the next segment
            theirs += (num_outs - 1) * bytes_a_row
    if SEGMENTS == 1:
        total = _dequantized(
            acc, 0, m, o, in_rows, in_outs, scale, zero, rowsum, weight_scale, weight_zero, colsum, num_outs, size,
            SEGMENTS, RANGES, HAS_ZERO, HAS_WEIGHT_ZERO,
        )  # fmt: skip
    finish(
        total, m, o, bias, addend, gate, residual, out, num_rows, num_outs, rows_a_line,
        HAS_BIAS, HAS_ADDEND, HAS_GATE, HAS_RESIDUAL, ACTIVATION,
    )  # fmt: skip
