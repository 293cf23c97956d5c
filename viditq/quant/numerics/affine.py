"""Affine quantization as pure functions, in the floating-point type of the tensors given.

Asymmetric: codes 0 .. 2^b - 1, scale = (hi - lo) / (2^b - 1) with lo <= 0 <= hi, zero_point = round(-lo /
scale).
Symmetric:  codes -2^(b-1) .. 2^(b-1) - 1, scale = max(|lo|, |hi|) / (2^(b-1) - 1), zero_point = 0.
Rounding is half to even. Parameters broadcast against the tensor they belong to.
"""

import torch
from torch import Tensor

SCALE_FLOOR = 1e-6  # of a group whose range is zero; its neighbours keep their own scale


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest code."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def compute_qparams(lo: Tensor, hi: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point of ranges [lo, hi], in their shape and type."""
    if symmetric:
        scale = torch.maximum(-lo, hi).div_(2 ** (bits - 1) - 1).clamp_(min=SCALE_FLOOR)
        return scale, torch.zeros_like(scale)
    lo = lo.clamp(max=0)
    scale = (hi.clamp(min=0) - lo).div_(2**bits - 1).clamp_(min=SCALE_FLOOR)
    return scale, lo.neg_().div_(scale).round_()


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Codes of `x`, int16."""
    low, high = code_range(bits, symmetric)
    return (x / scale).round_().add_(zero_point).clamp_(low, high).to(torch.int16)


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
    x: Tensor, lo: Tensor, hi: Tensor, bits: int, symmetric: bool, inplace: bool = False
) -> Tensor:
    """`fake_quantize` with the parameters of the own range of `x`: lower codes >= 0 need no clamp."""
    scale, zero_point = compute_qparams(lo, hi, bits, symmetric)
    y = x.div_(scale) if inplace else x / scale
    if symmetric:
        return y.round_().clamp_(*code_range(bits, True)).mul_(scale)
    return torch.minimum(y.round_(), 2**bits - 1 - zero_point, out=y).mul_(scale)
