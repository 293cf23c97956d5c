"""diffusers' BasicTransformerBlock as PixArt and Latte use it: adaLN-single, self- and cross-attention, an mlp.

Legend: B batch, N tokens, L caption tokens, C channels; modulation vectors are float32 [B, C].
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from viditq.fusion.attend import attend, heads, read_as
from viditq.fusion.block import FusedBlock, all_fusible
from viditq.fusion.patches import in_rows
from viditq.quant.execution.linear import products
from viditq.quant.execution.surroundings import After, Before

PLAIN_ATTENTION = {  # attribute of diffusers' Attention -> what it is where nothing but products and a softmax happens
    **dict.fromkeys(("group_norm", "spatial_norm", "norm_q", "norm_k", "add_k_proj")),
    **{"norm_cross": None, "residual_connection": False, "rescale_output_factor": 1.0},
}


class FusedBasicBlock(FusedBlock, BasicTransformerBlock):
    """q, k, v in one product, norm and modulation in the quantizer, GELU, gates, residuals behind the products."""

    @classmethod
    def reason_against(cls, block: BasicTransformerBlock) -> str | None:
        if block.norm_type != "ada_norm_single":
            return f"norm_type={block.norm_type} is not known"
        for name in ("pos_embed", "_chunk_size", "fuser"):
            if getattr(block, name, None) is not None:
                return f"{name} is not known"
        attentions = [a for a in (block.attn1, block.attn2) if a is not None]
        for attention in attentions:
            reason = against_attention(attention)
            if reason is not None:
                return reason
        if block.only_cross_attention or block.double_self_attention:
            return "its attention reads other inputs"
        reason = against_mlp(block.ff)
        linears = [one for a in attentions for one in (a.to_q, a.to_k, a.to_v, a.to_out[0])]
        return reason or all_fusible(block, [*linears, block.ff.net[0].proj, block.ff.net[2]])

    def unknown_call(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: Any = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: Any = None,
    ) -> str | None:
        if cross_attention_kwargs:
            return "cross_attention_kwargs are given"
        if hidden_states.ndim != 3 or timestep is None:
            return "its inputs have another shape"
        for attention in (self.attn1, self.attn2):
            if attention is not None and not isinstance(attention.processor, AttnProcessor2_0):
                return f"the attention processor {type(attention.processor).__name__} is not known"
        return None

    def fused(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: Any = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: Any = None,
    ) -> Tensor:
        assert timestep is not None
        x_BNC = in_rows(hidden_states)
        rows_6BC = timestep.reshape(len(x_BNC), 6, -1).transpose(0, 1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation(self.scale_shift_table.unsqueeze(1), rows_6BC)
        before = Before(self.norm1.eps, scale, shift)
        x_BNC = _attention(self.attn1, x_BNC, None, attention_mask, before, gate)
        if self.attn2 is not None:
            x_BNC = _attention(self.attn2, x_BNC, encoder_hidden_states, encoder_attention_mask, Before(), None)
        return mlp(self.ff, x_BNC, Before(self.norm2.eps, scale_mlp, shift_mlp), gate_mlp)


@torch.no_grad()
def modulation(table_61C: Tensor, rows_6BC: Tensor) -> tuple[Tensor, ...]:
    """Shift, 1 + scale and gate of attention, then of the mlp: the sum, float32 [B, C] each, as the products read them.

    Where every frame or place has its own row, as in Latte, these are as large as the tokens: two passes are enough.
    """
    if torch.compiler.is_compiling():  # which gives what is written to `out` the strides of its sources
        vectors_6BC = (table_61C.float() + rows_6BC).contiguous()
    else:
        vectors_6BC = torch.empty(rows_6BC.shape, dtype=torch.float32, device=rows_6BC.device)
        torch.add(table_61C.float(), rows_6BC, out=vectors_6BC)
    vectors_6BC[1::3].add_(1)
    return vectors_6BC.unbind(0)


def against_attention(attention: Attention) -> str | None:
    """What of this attention is more than products and a softmax."""
    for name, plain in PLAIN_ATTENTION.items():
        if getattr(attention, name, None) != plain:
            return f"attention with {name} is not known"
    return None


def against_mlp(ff: FeedForward) -> str | None:
    """What of this mlp is not Linear, GELU, Linear."""
    if not isinstance(ff.net[0], GELU) or len(ff.net) != 3:
        return f"an mlp with {type(ff.net[0]).__name__} is not known"
    return None


def _attention(
    attention: Attention,
    x_BNC: Tensor,
    text_BLC: Tensor | None,
    mask: Tensor | None,
    before: Before,
    gate: Tensor | None,
) -> Tensor:
    """x + gate * attention(before(x)), to the text where there is one."""
    parts: dict[str, Any] = attention._modules  # as attributes they are looked up twice, which cold caches make dear
    narrow = After(dtype=read_as(attention.processor, x_BNC.dtype))
    if text_BLC is None:
        q, k, v = products([parts["to_q"], parts["to_k"], parts["to_v"]], x_BNC, before, narrow)
    else:
        (q,) = products([parts["to_q"]], x_BNC, before, narrow)
        k, v = products([parts["to_k"], parts["to_v"]], text_BLC, after=narrow)
    if mask is not None:
        length, batch = k.shape[1], len(x_BNC)
        mask = attention.prepare_attention_mask(mask, length, batch).view(batch, attention.heads, -1, length)
    q, k, v = (heads(part, attention.heads) for part in (q, k, v))
    out_BNC = attend(attention.processor, q, k, v, mask, x_BNC.dtype)
    return products([parts["to_out"]._modules["0"]], out_BNC, after=After(gate=gate, residual=x_BNC))[0]


def mlp(ff: FeedForward, x_BNC: Tensor, before: Before, gate: Tensor | None) -> Tensor:
    """x + gate * mlp(before(x))."""
    net: dict[str, Any] = ff._modules["net"]._modules
    act = net["0"]
    name = "gelu_tanh" if act.approximate == "tanh" else "gelu"
    (hidden,) = products([act._modules["proj"]], x_BNC, before, After(name))  # type: ignore[list-item]
    return products([net["2"]], hidden, after=After(gate=gate, residual=x_BNC))[0]  # type: ignore[list-item]
