"""Rotary positions of pairs of neighbouring channels."""

import torch
from torch import Tensor


def rotate_pairs(x_BNHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (2i, 2i + 1) of channels turned by its angle; cos, sin broadcast with x, each value twice."""
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    if cos.device.type == "cpu" and cos.dtype == torch.float32 and not torch.compiler.is_compiling():
        # a pair is a complex number: one pass where the lines below take seven over every other channel; same sums
        pairs = torch.view_as_complex(x_BNHD.float().contiguous().unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(pairs * torch.complex(cos, sin))
    else:
        even, odd = x_BNHD.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return turned.flatten(-2).to(x_BNHD.dtype)
