"""Rotary positions of pairs of neighbouring channels."""

import torch
from torch import Tensor


def rotate_pairs(x_BNHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (2i, 2i + 1) of channels turned by its angle; cos, sin broadcast with x, each value twice."""
    even, odd = x_BNHD.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return turned.flatten(-2).to(x_BNHD.dtype)
