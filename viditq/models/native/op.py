"""`viditq::attention`: flash attention on a CPU, products in bf16, sums and softmax in float (attention.cpp).

Legend: B batch, L queries, K keys, H heads, G heads of keys (H is a multiple), D channels of a head.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from viditq import kernels
from viditq.errors import UserError

HEAD_DIMS = range(32, 129, 8)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INSTEAD = "Leave model.attention=null (torch's attention)."
SOURCES = ("attention.cpp", "amx.h", "avx512.h", "blocks.h", "pack.h", "softmax.h", "stream.h", "work.h")
NEEDED = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16", "fma", "f16c")
COMPILED = (*NEEDED, "amx-tile", "amx-bf16")  # the last two are used where the CPU says that it has them


@cache
def missing() -> str | None:
    """What this machine lacks to build and run the kernel; None = nothing."""
    try:
        kernels.check_cpu(NEEDED)
        kernels.compiler()
    except kernels.CannotBuild as reason:
        return str(reason)
    return None


def check_machine() -> None:
    """Raises UserError where `missing` names something."""
    lacking = missing()
    if lacking is not None:
        raise UserError(f"model.attention=native cannot run here: {lacking}. {INSTEAD}")


@cache
def load() -> None:
    """Register the op, its kernel built on first use into the user's cache; raises UserError with the reason if not."""
    check_machine()
    try:
        kernels.load([Path(__file__).with_name(name) for name in SOURCES], COMPILED)
    except kernels.CannotBuild as reason:
        raise UserError(f"model.attention=native: {reason}. {INSTEAD}") from reason
    torch.library.register_fake("viditq::attention", _fake)


def _fake(
    q_BLHD: Tensor,
    k_BKGD: Tensor,
    v_BKGD: Tensor,
    mask: Tensor | None,
    scale: float,
    amx: bool = True,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return q_BLHD.new_empty(q_BLHD.shape, dtype=out_dtype or q_BLHD.dtype)


def attention(
    q_BLHD: Tensor,
    k_BKGD: Tensor,
    v_BKGD: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """softmax(q k^T scale + mask) v, in bf16 with sums in float; call `load` before.

    q, k, v: views of any strides in bfloat16, float16 or float32; D in HEAD_DIMS. mask: bool (True = look) or added to
    the scores, broadcastable to [B, H, L, K]. scale: None = D^-1/2. out_dtype: None = q's; float32 of bfloat16 is what
    float32 of the same numbers gives. Returns [B, L, H, D]; zero for a query that may look at no key, as torch's.
    Gradients are torch's. Raises UserError for another device, dtype or head dim.

    Flash attention: Dao et al., arXiv 2205.14135, algorithm 1.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q_BLHD, k_BKGD, v_BKGD)):
        return _with_gradients(q_BLHD, k_BKGD, v_BKGD, mask, scale).to(out_dtype or q_BLHD.dtype)
    head_dim = q_BLHD.shape[-1]
    if q_BLHD.device.type not in ("cpu", "meta") or q_BLHD.dtype not in DTYPES:
        raise UserError(
            f"model.attention=native computes on a CPU in bfloat16, float16 or float32, not on {q_BLHD.device.type} in "
            f"{str(q_BLHD.dtype).removeprefix('torch.')}. {INSTEAD}"
        )
    check_head_dim(head_dim, "an attention layer")
    while mask is not None and mask.ndim < 4:
        mask = mask.unsqueeze(0)
    scale = head_dim**-0.5 if scale is None else scale
    return torch.ops.viditq.attention(q_BLHD, k_BKGD, v_BKGD, mask, scale, True, out_dtype)


def check_head_dim(head_dim: int, layer: str) -> None:
    """Raises UserError where the kernel does not take heads of this size."""
    if head_dim not in HEAD_DIMS:
        raise UserError(
            f"model.attention=native takes heads of {HEAD_DIMS[0]} to {HEAD_DIMS[-1]} channels, a multiple of 8; "
            f"{layer} has heads of {head_dim}. {INSTEAD}"
        )


def _with_gradients(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    shared = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=shared).transpose(1, 2)
