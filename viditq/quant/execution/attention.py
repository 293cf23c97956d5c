"""Attention in 8 bits, emulated in float: what SageAttention's kernels cost in quality, on any machine.

Legend: B batch, H heads, N queries, L keys, D channels of a head. As in SageAttention (arXiv 2410.02367): queries, and
keys less their mean over the tokens (which moves all scores of a query alike), become int8 with a scale for each head
and each group of tokens, their sums of products are exact. As in SageAttention 2 (arXiv 2411.10958), where asked for:
probabilities before they are normalized become e4m3 under a scale of 1 / 448, values e4m3 with a scale a channel.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from viditq.errors import UserError
from viditq.hooks import add_hook
from viditq.quant.calibration.context import denoisers_of
from viditq.quant.numerics.affine import usable_scale
from viditq.quant.numerics.float_grid import rounded

KINDS = {"int8_qk": False, "int8_qk_fp8_pv": True}
"""Name -> whether probabilities and values are e4m3 too."""


class Shares(NamedTuple):
    """Which tokens share a scale: of each `span` neighbours all, or those whose place among 8 is in one of `parts`."""

    span: int
    parts: int = 1

    def group(self, tokens: Tensor) -> Tensor:
        """Number of each token's group."""
        return tokens // self.span * self.parts + tokens % 8 * self.parts // 8


GRANULARITIES = {
    "token": (Shares(1), Shares(1)),
    "thread": (Shares(32, 8), Shares(64, 4)),
    "thread_sm90": (Shares(16, 8), Shares(128, 4)),
    "warp": (Shares(32), Shares(64)),
    "block": (Shares(128), Shares(64)),
}
"""Name -> groups of queries and of keys: those of SageAttention's kernels, and a scale a token, finer than any of them.

A thread of a matrix instruction holds rows that lie 8 apart of one side, and pairs of columns 8 apart of the other.
"""
LARGEST_CODE, LARGEST_E4M3 = 127.0, 448.0
SCORES_AT_ONCE = 2**25


def check_attention(kind: str | None, granularity: str = "token") -> None:
    """Raises UserError for an unknown name, and for groups of tokens where nothing is emulated."""
    if not isinstance(granularity, str) or granularity not in GRANULARITIES:
        allowed = ", ".join(GRANULARITIES)
        raise UserError(f"quant.attention_granularity={granularity!r}: choose one of {allowed}.")
    if kind is None and granularity != "token":
        raise UserError(
            f"quant.attention_granularity={granularity} goes with an attention that is emulated: set "
            f"quant.attention to one of {', '.join(KINDS)}, or leave this out."
        )
    if kind is not None and (not isinstance(kind, str) or kind not in KINDS):
        raise UserError(f"quant.attention={kind!r}: choose null or one of {', '.join(KINDS)}.")


def emulate_attention(denoiser: nn.Module, kind: str, granularity: str = "token") -> None:
    """Every `scaled_dot_product_attention` that `denoiser` calls is computed by `attention` from now on.

    kind, granularity: names of KINDS and GRANULARITIES. At its first call it raises UserError for one that calls none.
    """
    for part in denoisers_of(denoiser).values():
        mode = _Instead(type(part).__name__, KINDS[kind], granularity)
        add_hook(part.register_forward_pre_hook, mode.begin)
        add_hook(part.register_forward_hook, mode.end, always_call=True)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    fp8_pv: bool = False,
    granularity: str = "token",
) -> Tensor:
    """As torch's: q [B, H, N, D], k and v [B, H, L, D] -> [B, H, N, D] in the dtype of q; computed in float32.

    granularity: of the scales of queries and keys, one of GRANULARITIES.
    """
    if dropout_p:
        raise UserError("quant.attention emulates inference, and this model drops out: put it into eval mode.")
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (part.repeat_interleave(repeats, -3) for part in (key, value))
    mask = _mask(query, key, attn_mask, is_causal)
    of_queries, of_keys = GRANULARITIES[granularity]
    q = _rounded(query.float() * (1 / math.sqrt(query.shape[-1]) if scale is None else scale), of_queries)
    k = key.float()
    k, v = _rounded(k - k.mean(-2, keepdim=True), of_keys), value.float()
    if fp8_pv:
        step = usable_scale(v.abs().amax(-2, keepdim=True) / LARGEST_E4M3)
        v = rounded(v / step, "e4m3") * step
    rows = max(SCORES_AT_ONCE // max(k[..., 0].numel(), 1), 1)
    pieces = zip(q.split(rows, -2), _pieces(mask, rows, query.shape[-2]), strict=True)
    outs = [_weighted(piece @ k.mT, part, v, fp8_pv) for piece, part in pieces]
    return torch.cat(outs, -2).to(query.dtype)


def _rounded(x: Tensor, shares: Shares) -> Tensor:
    """[..., N, D] on the grid of int8, tokens N."""
    amax = x.abs().amax(-1)
    if shares.span > 1:
        group_N = shares.group(torch.arange(amax.shape[-1], device=x.device))
        groups = amax.new_zeros((*amax.shape[:-1], (amax.shape[-1] // shares.span + 1) * shares.parts))
        amax = groups.scatter_reduce_(-1, group_N.expand_as(amax), amax, "amax")[..., group_N]
    step = usable_scale(amax.unsqueeze(-1) / LARGEST_CODE)
    return (x / step).round_() * step


def _weighted(scores: Tensor, mask: Tensor | None, v: Tensor, fp8_pv: bool) -> Tensor:
    if mask is not None:
        scores = scores + mask
    top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    p = (scores - top).exp_()
    total = p.sum(-1, keepdim=True)
    if fp8_pv:
        p = rounded(p * LARGEST_E4M3, "e4m3") / LARGEST_E4M3
    return p @ v / torch.where(total > 0, total, 1.0)


def _mask(query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """What is added to the scores."""
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is None or attn_mask.dtype != torch.bool:
        return None if attn_mask is None else attn_mask.float()
    return torch.zeros_like(attn_mask, dtype=torch.float32).masked_fill_(~attn_mask, -torch.inf)


def _pieces(mask: Tensor | None, rows: int, count: int) -> list[Tensor | None]:
    if mask is None or mask.ndim < 2 or mask.shape[-2] == 1:
        return [mask] * max(-(-count // rows), 1)
    return list(mask.split(rows, -2))


class _Instead(TorchFunctionMode):
    """Between `begin` and `end` of a module's forward torch's attention is ours."""

    def __init__(self, module: str, fp8_pv: bool, granularity: str) -> None:
        super().__init__()
        self.module, self.calls = module, 0
        self.how: dict[str, Any] = {"fp8_pv": fp8_pv, "granularity": granularity}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return attention(*args, **((kwargs or {}) | self.how))

    def begin(self, *_: Any) -> None:
        self.__enter__()

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.__exit__(None, None, None)
        if not self.calls and output is not None:
            raise UserError(
                f"quant.attention: {self.module} computes its attention by other means than torch's "
                "scaled_dot_product_attention, so that this would change nothing. Leave quant.attention=null."
            )
