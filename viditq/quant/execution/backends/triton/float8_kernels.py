# mypy: ignore-errors
"""The kernels of FP8 numbers; as `kernels`, imported only where triton is.

Codes are rounded by arithmetic on bits, not by a cast: triton's interpreter casts wrongly, and a device without an
instruction for it would do so in another way than the next. Legend: M rows, C in_features, Q C padded, O out_features.
"""

import triton
import triton.language as tl

from viditq.quant.execution.backends.triton.kernels import EMPTY_SCALE, finish, prepared, tile_of

NAN_CODE = tl.constexpr(0x7F)  # of both formats


@triton.jit
def nearest(t, LARGEST: tl.constexpr, BIAS: tl.constexpr, MANTISSA: tl.constexpr):
    """Bit patterns of the nearest numbers, ties to even; what lies beyond the largest number becomes it."""
    DROPPED: tl.constexpr = 23 - MANTISSA
    sign = (t.to(tl.int32, bitcast=True) >> 24) & 0x80
    size = tl.minimum(tl.abs(t), LARGEST)
    bits = size.to(tl.int32, bitcast=True)
    normal = (bits + ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)) >> DROPPED
    normal -= (127 - BIAS) << MANTISSA
    unit = tl.zeros_like(bits) + ((151 - BIAS - MANTISSA) << 23)  # a float whose last place is the smallest number
    subnormal = (size + unit.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True) - unit
    code = tl.where(bits < (128 - BIAS) << 23, subnormal, normal) | sign
    return tl.where(t != t, NAN_CODE, code)


@triton.jit
def quantize_float8_rows(
    x,  # [M, C], any float
    codes,  # uint8 [M, Q]
    scale,  # float32 [M]; where none is given
    div,  # [C]
    mul,  # [lines, C]
    add,  # [lines, C]
    given_scale,  # [samples]
    x_stride,
    rows_a_line,  # of mul and add
    rows_a_sample,  # of the given scale
    width,
    padded,
    eps,
    LARGEST: tl.constexpr,  # number of the format
    BIAS: tl.constexpr,  # of its exponents
    MANTISSA: tl.constexpr,  # its bits
    NORM: tl.constexpr,
    HAS_MUL: tl.constexpr,
    HAS_ADD: tl.constexpr,
    HAS_DIV: tl.constexpr,
    GIVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of one row: ((layernorm(x) * mul + add) / div) as codes, and the scale that they are counted in."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    t = prepared(
        x, div, mul, add, row, column, inside, width, x_stride, rows_a_line, eps, NORM, HAS_MUL, HAS_ADD, HAS_DIV
    )
    if GIVEN:
        step = tl.load(given_scale + row // rows_a_sample)
    else:
        step = tl.div_rn(tl.max(tl.abs(t), 0), LARGEST * 1.0)
        step = tl.where(step <= 0.0, EMPTY_SCALE, step)
        spoilt = tl.max((t != t).to(tl.int32), 0) > 0  # maxima pass over NaN on a GPU
        step = tl.where(spoilt, float("nan"), step)
        tl.store(scale + row, step)
    t = tl.div_rn(t, step + tl.zeros_like(t))
    code = tl.where(inside, nearest(t, LARGEST, BIAS, MANTISSA), 0)
    tl.store(codes + row * padded + column, code.to(tl.uint8), mask=column < padded)


@triton.jit
def multiply_float8(
    codes,  # FP8 [M, Q]
    scale,  # float32 [M] or [1]
    weight,  # FP8 [at least O, Q]
    weight_scale,  # float32 [O] or [1]
    bias,  # [O]
    addend,  # [M, O]
    gate,  # [lines, O]
    residual,  # [M, O]
    out,  # [M, O]
    num_rows,
    num_outs,
    padded,
    rows_a_line,
    A_SCALE_A_ROW: tl.constexpr,
    A_SCALE_AN_OUTPUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WHOLE: tl.constexpr,  # whether BLOCK_K divides Q
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """residual + gate * activation(dequantized(codes weight^T) + bias + addend), one tile [BLOCK_M, BLOCK_O] of it.

    The matrix units add up BLOCK_K products at a time, in which they keep few digits; sums of these are float32's.
    """
    m, o = tile_of(num_rows, num_outs, BLOCK_M, BLOCK_O, GROUP)
    in_rows, in_outs = m < num_rows, o < num_outs
    k = tl.arange(0, BLOCK_K)
    mine = codes + m[:, None] * padded + k[None, :]
    theirs = weight + o[:, None] * padded + k[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for i in range(0, tl.cdiv(padded, BLOCK_K)):
        if WHOLE:
            a = tl.load(mine, mask=in_rows[:, None], other=0.0)
            b = tl.load(theirs, mask=in_outs[:, None], other=0.0)
        else:
            left = k[None, :] < padded - i * BLOCK_K
            a = tl.load(mine, mask=in_rows[:, None] & left, other=0.0)
            b = tl.load(theirs, mask=in_outs[:, None] & left, other=0.0)
        mine += BLOCK_K
        theirs += BLOCK_K
        total += tl.dot(a, tl.trans(b), max_num_imprecise_acc=BLOCK_K, out_dtype=tl.float32)
    row_scale = tl.load(scale + m * A_SCALE_A_ROW, mask=in_rows, other=0.0)
    column_scale = tl.load(weight_scale + o * A_SCALE_AN_OUTPUT, mask=in_outs, other=0.0)
    total = total * (row_scale[:, None] * column_scale[None, :])
    finish(
        total, m, o, bias, addend, gate, residual, out, num_rows, num_outs, rows_a_line,
        HAS_BIAS, HAS_ADDEND, HAS_GATE, HAS_RESIDUAL, ACTIVATION,
    )  # fmt: skip
