"""diffusers' two Flux blocks: FluxTransformerBlock of two streams, FluxSingleTransformerBlock of one.

Legend: B batch, N tokens of text and image, C channels; modulation vectors are [B, C].
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from viditq.fusion.attend import attend, heads
from viditq.fusion.basic_block import against_mlp, mlp
from viditq.fusion.block import FusedBlock, all_fusible
from viditq.fusion.norms import rms_norm
from viditq.fusion.rotary import rotate_pairs
from viditq.quant.execution.linear import products
from viditq.quant.execution.surroundings import After, Before

LIMIT = 65504.0  # of float16, to which the plain blocks clip it


class FusedFluxBlock(FusedBlock, FluxTransformerBlock):
    """Of each stream q, k, v in one product, norms and modulation in the quantizer, the rest behind the products."""

    @classmethod
    def reason_against(cls, block: FluxTransformerBlock) -> str | None:
        attention = block.attn
        linears = [attention.to_q, attention.to_k, attention.to_v, attention.to_out[0], attention.to_add_out]
        linears += [attention.add_q_proj, attention.add_k_proj, attention.add_v_proj]
        for ff in (block.ff, block.ff_context):
            linears += [ff.net[0].proj, ff.net[2]] if against_mlp(ff) is None else []
        reasons = (against_mlp(block.ff), against_mlp(block.ff_context), _against_norm(block.norm1.norm))
        return next(filter(None, reasons), None) or _against(attention) or all_fusible(block, linears)

    def unknown_call(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> str | None:
        return _unknown(self.attn, joint_attention_kwargs)

    def fused(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        attention, text_length = self.attn, encoder_hidden_states.shape[1]
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = _vectors(self.norm1, temb, 6)
        c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = _vectors(self.norm1_context, temb, 6)
        own = [attention.to_q, attention.to_k, attention.to_v]
        image = products(own, hidden_states, Before(self.norm1.norm.eps, 1 + scale, shift))
        added = [attention.add_q_proj, attention.add_k_proj, attention.add_v_proj]
        text = products(added, encoder_hidden_states, Before(self.norm1_context.norm.eps, 1 + c_scale, c_shift))
        q, k, v = (heads(part, attention.heads) for part in image)
        q_text, k_text, v_text = (heads(part, attention.heads) for part in text)
        q = torch.cat([rms_norm(attention.norm_added_q, q_text), rms_norm(attention.norm_q, q)], 1)
        k = torch.cat([rms_norm(attention.norm_added_k, k_text), rms_norm(attention.norm_k, k)], 1)
        out_BNC = _attend(attention, q, k, torch.cat([v_text, v], 1), image_rotary_emb)
        text_out, image_out = out_BNC.split([text_length, out_BNC.shape[1] - text_length], 1)
        after = After(gate=gate, residual=hidden_states)
        (hidden_states,) = products([attention.to_out[0]], image_out.contiguous(), after=after)
        after = After(gate=c_gate, residual=encoder_hidden_states)
        (encoder_hidden_states,) = products([attention.to_add_out], text_out.contiguous(), after=after)
        hidden_states = mlp(self.ff, hidden_states, Before(self.norm2.eps, 1 + scale_mlp, shift_mlp), gate_mlp)
        before = Before(self.norm2_context.eps, 1 + c_scale_mlp, c_shift_mlp)
        return _clipped(mlp(self.ff_context, encoder_hidden_states, before, c_gate_mlp)), hidden_states


class FusedFluxSingleBlock(FusedBlock, FluxSingleTransformerBlock):
    """q, k, v and the mlp's first product from one norm and modulation; gate and residual behind the last product."""

    @classmethod
    def reason_against(cls, block: FluxSingleTransformerBlock) -> str | None:
        attention = block.attn
        if not isinstance(block.act_mlp, nn.GELU):
            return f"an mlp with {type(block.act_mlp).__name__} is not known"
        linears = [attention.to_q, attention.to_k, attention.to_v, block.proj_mlp, block.proj_out]
        return _against_norm(block.norm.norm) or _against(attention) or all_fusible(block, linears)

    unknown_call = FusedFluxBlock.unknown_call

    def fused(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        attention, text_length = self.attn, encoder_hidden_states.shape[1]
        x_BNC = torch.cat([encoder_hidden_states, hidden_states], 1)
        shift, scale, gate = _vectors(self.norm, temb, 3)
        before = Before(self.norm.norm.eps, 1 + scale, shift)
        q, k, v = products([attention.to_q, attention.to_k, attention.to_v], x_BNC, before)
        gelu = "gelu_tanh" if self.act_mlp.approximate == "tanh" else "gelu"
        (hidden,) = products([self.proj_mlp], x_BNC, before, After(gelu))
        q, k, v = (heads(part, attention.heads) for part in (q, k, v))
        out_BNC = _attend(attention, rms_norm(attention.norm_q, q), rms_norm(attention.norm_k, k), v, image_rotary_emb)
        after = After(gate=gate, residual=x_BNC)
        (x_BNC,) = products([self.proj_out], torch.cat([out_BNC, hidden], 2), after=after)
        x_BNC = _clipped(x_BNC)
        return x_BNC[:, :text_length], x_BNC[:, text_length:]


def _against(attention: FluxAttention) -> str | None:
    return "fused projections are not known" if attention.fused_projections else None


def _against_norm(norm: nn.Module) -> str | None:
    plain = isinstance(norm, nn.LayerNorm) and norm.weight is None
    return None if plain else f"the norm {type(norm).__name__} is not known"


def _unknown(attention: FluxAttention, joint_attention_kwargs: dict[str, Any] | None) -> str | None:
    if joint_attention_kwargs:
        return "joint_attention_kwargs are given"
    if type(attention.processor) is not FluxAttnProcessor:
        return f"the attention processor {type(attention.processor).__name__} is not known"
    return None


def _vectors(norm: AdaLayerNormZero | AdaLayerNormZeroSingle, temb: Tensor, count: int) -> list[Tensor]:
    """Shift, scale and gate (twice where `count` is 6) from the time embedding, float32 [B, C] each."""
    return [one.float().contiguous() for one in norm.linear(norm.silu(temb)).chunk(count, dim=1)]


def _attend(attention: FluxAttention, q: Tensor, k: Tensor, v: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    if rotary is not None:
        cos, sin = (angles_ND[:, None] for angles_ND in rotary)
        q, k = (rotate_pairs(part, cos, sin) for part in (q, k))
    return attend(attention.processor, q, k, v).to(q.dtype)


def _clipped(x: Tensor) -> Tensor:
    return x.clip(-LIMIT, LIMIT) if x.dtype == torch.float16 else x
