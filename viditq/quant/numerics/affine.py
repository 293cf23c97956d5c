"""Affine quantization as pure functions, in the floating-point type of the tensors given.

Asymmetric: codes 0 .. 2^b - 1, scale = (hi - lo) / (2^b - 1) with lo <= 0 <= hi, zero_point = round(-lo /
scale).
Symmetric:  codes -2^(b-1) .. 2^(b-1) - 1, scale = max(|lo|, |hi|) / (2^(b-1) - 1), zero_point = 0;
full range: scale = max(|lo|, |hi|) / ((2^b - 1) / 2). The largest value lies midway between two codes there, so that
it matters that torchao, whose grid it is, multiplies by 1 / scale.
A scale is as small as its range asks for. Where that is not above 0 (a range of zeros, or one so small that the
quotient underflows) it is EMPTY_SCALE, and all of the group becomes 0. hi - lo is formed as hi / 2 - lo / 2 over half
as many steps: the same bits, but it does not overflow. NaN and inf in a range stay what they are.
Codes are x / scale, a true division, rounded half to even, plus zero_point, then clamped. Parameters broadcast against
the tensor they belong to.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EMPTY_SCALE = 1e-6


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest code."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def compute_qparams(
    lo: Tensor, hi: Tensor, bits: int, symmetric: bool, full_range: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of ranges [lo, hi], in their shape and type. full_range: of a symmetric grid."""
    if symmetric:
        steps = (2**bits - 1) / 2 if full_range else 2 ** (bits - 1) - 1
        scale = usable_scale(torch.maximum(-lo, hi).div_(divisor(steps, lo.device)))
        return scale, torch.zeros_like(scale)
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    scale = usable_scale(hi.mul_(0.5).sub_(lo, alpha=0.5).div_(divisor((2**bits - 1) / 2, lo.device)))
    return scale, lo.neg_().div_(scale).round_()


def divisor(number: float, device: torch.device) -> Tensor | float:
    """`number` to divide by: where it is no tensor there, torch multiplies by 1 / number on CUDA, an ulp away."""
    return number if device.type == "cpu" else torch.full((), float(number), device=device)


def usable_scale(scale: Tensor) -> Tensor:
    """`scale` itself, overwritten with EMPTY_SCALE where it is not above 0."""
    return F.threshold(scale, 0.0, EMPTY_SCALE, inplace=True)


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, symmetric: bool, full_range: bool = False
) -> Tensor:
    """Codes of `x`, int16."""
    return float_codes(x, scale, zero_point, bits, symmetric, full_range).to(torch.int16)


def float_codes(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, symmetric: bool, full_range: bool = False
) -> Tensor:
    """The same in the type of `x`."""
    low, high = code_range(bits, symmetric)
    steps = x * (1 / scale) if full_range else x / scale
    return steps.round_().add_(zero_point).clamp_(low, high)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """(codes - zero_point) * scale, in the type of `scale`."""
    return (codes.to(scale.dtype) - zero_point) * scale


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, symmetric: bool, inplace: bool = False
) -> Tensor:
    """Exactly `dequantize(quantize(x))` without forming the codes; `inplace` overwrites a floating `x`."""
    low, high = code_range(bits, symmetric)
    y = x.div_(scale) if inplace else x / scale
    y.round_()
    if symmetric:
        return y.clamp_(low, high).mul_(scale)
    torch.maximum(y, low - zero_point, out=y)  # clamp with two tensors is 20x slower on CPU
    return torch.minimum(y, high - zero_point, out=y).mul_(scale)


def fake_quantize_own_range(
    x: Tensor,
    lo: Tensor,
    hi: Tensor,
    bits: int,
    symmetric: bool,
    inplace: bool = False,
    full_range: bool = False,
) -> Tensor:
    """`fake_quantize` with the parameters of the own range of `x`: lower codes >= 0 need no clamp."""
    scale, zero_point = compute_qparams(lo, hi, bits, symmetric, full_range)
    if full_range:
        return float_codes(x, scale, zero_point, bits, symmetric, full_range).mul_(scale)
    y = x.div_(scale) if inplace else x / scale
    if symmetric:
        return y.round_().clamp_(*code_range(bits, True)).mul_(scale)
    return torch.minimum(y.round_(), 2**bits - 1 - zero_point, out=y).mul_(scale)
