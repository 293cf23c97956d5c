"""Codes of 2 to 8 bits, stored without gaps.

Eight codes of b bits make b bytes: code i sits in bits [b i, b (i + 1)) of a little-endian group. Rows start
on a byte; a row of n codes takes ceil(n b / 8) bytes.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

LITTLE_ENDIAN = sys.byteorder == "little"


def packed_size(num_codes: int, bits: int) -> int:
    """Bytes of one row."""
    return -(-num_codes * bits // 8)


def _overlaps(bits: int) -> list[tuple[int, int, int]]:
    """(code, byte, shift) for each of the 8 codes and each byte it touches; shift < 0 is to the right."""
    starts = [divmod(bits * code, 8) for code in range(8)]
    firsts = [(code, byte, offset) for code, (byte, offset) in enumerate(starts)]
    seconds = [(code, byte + 1, offset - 8) for code, byte, offset in firsts if offset + bits > 8]
    return firsts + seconds


def _shifted(values: Tensor, shift: int) -> Tensor:
    return values << shift if shift >= 0 else values >> -shift


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., n] below 2^bits -> uint8 bytes [..., ceil(n bits / 8)]."""
    assert codes.dtype == torch.uint8 and 2 <= bits <= 8
    if bits == 8:
        return codes.contiguous()
    if bits == 4 and codes.shape[-1] % 2 == 0 and LITTLE_ENDIAN:  # two codes at once: a fifth of the time
        pairs = codes.contiguous().view(torch.int16)  # first + 256 second
        return (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)
    padded = F.pad(codes, (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8))
    out = padded.new_zeros(*padded.shape[:-1], bits)
    for code, byte, shift in _overlaps(bits):
        out[..., byte] |= _shifted(padded[..., code], shift)
    return out.flatten(-2)[..., : packed_size(codes.shape[-1], bits)].contiguous()


def unpack(packed: Tensor, bits: int, num_last: int) -> Tensor:
    """Inverse of `pack`: uint8 bytes -> uint8 codes [..., num_last]."""
    assert packed.dtype == torch.uint8 and packed.shape[-1] == packed_size(num_last, bits)
    if bits == 8:
        return packed
    if bits == 4 and num_last % 2 == 0 and LITTLE_ENDIAN:
        pairs = packed.to(torch.int16)
        return (pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F).view(torch.uint8)
    padded = F.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))
    out = padded.new_zeros(*padded.shape[:-1], 8)
    for code, byte, shift in _overlaps(bits):
        out[..., code] |= _shifted(padded[..., byte], -shift)
    return out.bitwise_and_(2**bits - 1).flatten(-2)[..., :num_last].contiguous()
