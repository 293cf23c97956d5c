"""Norms of queries and keys."""

import torch
from torch import Tensor, nn


def rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x), to the bit; on a CPU torch's own RMSNorm takes half as many passes again over memory."""
    if not (type(norm) is nn.RMSNorm and x.device.type == "cpu" and len(norm.normalized_shape) == 1):
        return norm(x)  # type: ignore[no-any-return]
    if norm.weight is None or norm.eps is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return norm(x)  # type: ignore[no-any-return]
    y = x.float()
    inverse = torch.rsqrt(y.square().mean(-1, keepdim=True) + norm.eps)
    scaled = y * inverse if y is x else y.mul_(inverse)
    return scaled.mul_(norm.weight.float()).to(x.dtype)
