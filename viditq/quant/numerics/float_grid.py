"""Narrow floating-point numbers as grids, as pure functions: FP8 (e4m3, e5m2), FP4 (e2m1), and scales of three kinds.

Numbers: OCP 8-bit Floating Point Specification 1.0 (e4m3 without infinities: largest 448) and OCP Microscaling Formats
1.0 (e2m1: largest 6). Rounded half to even; what lies beyond the largest number becomes it, NaN stays NaN.
Scales: float32 (amax / largest); e8m0, a power of two as of Microscaling 1.0, 5.2 (2^(floor(log2 amax) - emax)); e4m3
under one float32 scale of the whole tensor, as of NVIDIA's NVFP4. A tensor is first divided by its scale, truly.
A scale that would be 0 is as in `affine`; NaN and inf stay what they are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from viditq.quant.numerics.affine import divisor, usable_scale


@dataclass(frozen=True)
class Number:
    """largest: the largest magnitude; exponent: its power of two. dtype: torch's, None where it has none to cast to."""

    bits: int
    largest: float
    exponent: int
    dtype: torch.dtype | None = None


NUMBERS = {
    "e4m3": Number(8, 448.0, 8, torch.float8_e4m3fn),
    "e5m2": Number(8, 57344.0, 15, torch.float8_e5m2),
    "e2m1": Number(4, 6.0, 2),
}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; the fourth bit is the sign
SMALLEST_BLOCK_SCALE = 2.0**-6  # the smallest normal e4m3
EXPONENT_BIAS = 127  # of e8m0


def rounded(x: Tensor, number: str) -> Tensor:
    """The nearest numbers, float32."""
    of = NUMBERS[number]
    if of.dtype is not None:
        return narrowed(x, number).float()
    x = x.float().clamp(-of.largest, of.largest)
    magnitude = x.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return (x / step).round_().mul_(step)


def narrowed(x: Tensor, number: str) -> Tensor:
    """The same in torch's own type of that number, which it must have."""
    of = NUMBERS[number]
    assert of.dtype is not None
    return x.float().clamp(-of.largest, of.largest).to(of.dtype)  # torch's e5m2 would overflow to inf


def codes_of(values: Tensor, number: str) -> Tensor:
    """Bit patterns, uint8, of values that `rounded` gave."""
    dtype = NUMBERS[number].dtype
    if dtype is not None:
        return values.to(dtype).view(torch.uint8)
    indices = torch.bucketize(values.abs(), torch.tensor(E2M1, device=values.device))
    return (indices + 8 * torch.signbit(values)).to(torch.uint8)


def values_of(codes: Tensor, number: str) -> Tensor:
    """Inverse of `codes_of`, float32."""
    dtype = NUMBERS[number].dtype
    if dtype is not None:
        return codes.view(dtype).float()
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)
    return table[codes.long()]


def float_scale(amax: Tensor, number: str) -> Tensor:
    """By which tensors of this largest magnitude are divided."""
    return usable_scale(amax.float() / divisor(NUMBERS[number].largest, amax.device))


def power_scale(amax: Tensor, number: str) -> Tensor:
    """The same as a power of two, 2^-127 to 2^127."""
    amax = amax.float()
    exponent = amax.frexp().exponent - 1 - NUMBERS[number].exponent
    exponent = torch.where(amax == 0, -EXPONENT_BIAS, exponent.clamp(-EXPONENT_BIAS, EXPONENT_BIAS))
    return torch.where(amax.isfinite(), torch.ldexp(torch.ones_like(amax), exponent), amax)


def two_level_scale(amax: Tensor, tensor_amax: Tensor, number: str) -> tuple[Tensor, Tensor]:
    """(e4m3 scale of each block times the scale of all of the tensor, the latter)."""
    largest, device = NUMBERS[number].largest, amax.device
    tensor_scale = usable_scale(tensor_amax.float() / divisor(largest * NUMBERS["e4m3"].largest, device))
    block_scale = rounded(
        (amax.float() / divisor(largest, device) / tensor_scale).clamp(min=SMALLEST_BLOCK_SCALE), "e4m3"
    )
    return block_scale * tensor_scale, tensor_scale


def stored_scale(scale: Tensor, block_scale: str, tensor_scale: Tensor | None) -> Tensor:
    """What `power_scale` or `two_level_scale` gave, as a byte each."""
    if block_scale == "e8m0":
        return (scale.frexp().exponent - 1 + EXPONENT_BIAS).to(torch.uint8)
    assert tensor_scale is not None
    return codes_of(rounded(scale / tensor_scale, "e4m3"), "e4m3")


def loaded_scale(stored: Tensor, block_scale: str, tensor_scale: Tensor | None) -> Tensor:
    """Inverse of `stored_scale`, float32."""
    if block_scale == "e8m0":
        return torch.ldexp(torch.ones_like(stored, dtype=torch.float32), stored.to(torch.int32) - EXPONENT_BIAS)
    assert tensor_scale is not None
    return values_of(stored, "e4m3") * tensor_scale
