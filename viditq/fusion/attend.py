"""Attention inside a fused block, by what the block's own processor would have called.

Legend: B batch, N queries, L keys, H heads, D channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from viditq.models.native.op import attention


def read_as(processor: Any, dtype: torch.dtype) -> torch.dtype | None:
    """The type that q, k and v of `dtype` are rounded to first, so that they may be written in it; None = their own."""
    rounds = dtype == torch.float32 and getattr(processor, "is_native", False)
    return torch.bfloat16 if rounds else None


def attend(
    processor: Any,
    q_BNHD: Tensor,
    k_BLHD: Tensor,
    v_BLHD: Tensor,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v as [B, N, H D]. mask: broadcasts with [B, H, N, L].

    dtype: of the output where q, k and v were written as `read_as` has it; None = that of q.
    """
    if isinstance(processor, AttnProcessor2_0):
        if getattr(processor, "is_native", False):  # model.attention=native
            return attention(q_BNHD, k_BLHD, v_BLHD, mask, out_dtype=dtype).flatten(2)
        q, k, v = (x.transpose(1, 2) for x in (q_BNHD, k_BLHD, v_BLHD))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    backend = processor._attention_backend
    return dispatch_attention_fn(q_BNHD, k_BLHD, v_BLHD, attn_mask=mask, backend=backend).flatten(2)


def heads(x_BNC: Tensor, num_heads: int) -> Tensor:
    """[B, N, H D] -> [B, N, H, D], a view."""
    return x_BNC.view(*x_BNC.shape[:-1], num_heads, -1)
