"""Codes of 2 to 8 bits, stored without gaps.

Eight codes of b bits make b bytes: code i sits in bits [b i, b (i + 1)) of a little-endian word. Rows start
on a byte; a row of n codes takes ceil(n b / 8) bytes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_size(num_codes: int, bits: int) -> int:
    """Bytes of one row."""
    return -(-num_codes * bits // 8)


def _regroup(values: Tensor, width_in: int, width_out: int) -> Tensor:
    """[..., n, k] fields of `width_in` bits -> [..., n, 8 or b] fields of `width_out` bits."""
    num_in = values.shape[-1]
    shifts_in = torch.arange(num_in, device=values.device) * width_in
    word = (values.long() << shifts_in).sum(-1, keepdim=True)
    shifts_out = torch.arange(num_in * width_in // width_out, device=values.device) * width_out
    return ((word >> shifts_out) & (2**width_out - 1)).to(torch.uint8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., n] below 2^bits -> uint8 bytes [..., ceil(n bits / 8)]."""
    assert codes.dtype == torch.uint8 and 2 <= bits <= 8
    if bits == 8:
        return codes.clone()
    num_codes = codes.shape[-1]
    padded = F.pad(codes, (0, -num_codes % 8)).unflatten(-1, (-1, 8))
    return _regroup(padded, bits, 8).flatten(-2)[..., : packed_size(num_codes, bits)].contiguous()


def unpack(packed: Tensor, bits: int, num_last: int) -> Tensor:
    """Inverse of `pack`: uint8 bytes -> uint8 codes [..., num_last]."""
    assert packed.dtype == torch.uint8 and packed.shape[-1] == packed_size(num_last, bits)
    if bits == 8:
        return packed.clone()
    padded = F.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))
    return _regroup(padded, 8, bits).flatten(-2)[..., :num_last].contiguous()
