"""diffusers' WanTransformerBlock: self-attention with rotary positions, cross-attention, an mlp.

Legend: B batch, N tokens, L caption tokens, C channels; modulation vectors are float32 [B, C], or [B N, C] where each
token has its own (Wan 2.2 5B).
"""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanTransformerBlock
from torch import Tensor, nn

from viditq.fusion.attend import attend, heads
from viditq.fusion.basic_block import against_mlp, mlp
from viditq.fusion.block import FusedBlock, all_fusible
from viditq.fusion.norms import rms_norm
from viditq.fusion.patches import in_rows
from viditq.fusion.rotary import rotate_pairs
from viditq.quant.execution.linear import products
from viditq.quant.execution.surroundings import After, Before


class FusedWanBlock(FusedBlock, WanTransformerBlock):
    """q, k, v in one product, norm and modulation in the quantizer, GELU, gates, residuals behind the products."""

    @classmethod
    def reason_against(cls, block: WanTransformerBlock) -> str | None:
        linears = [one for a in (block.attn1, block.attn2) for one in (a.to_q, a.to_k, a.to_v, a.to_out[0])]
        for attention in (block.attn1, block.attn2):
            if attention.add_k_proj is not None or attention.fused_projections:
                return "attention to an image is not known"
        reason = against_mlp(block.ffn)
        return reason or all_fusible(block, [*linears, block.ffn.net[0].proj, block.ffn.net[2]])

    def unknown_call(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any
    ) -> str | None:
        for attention in (self.attn1, self.attn2):
            if not isinstance(attention.processor, WanAttnProcessor):
                return f"the attention processor {type(attention.processor).__name__} is not known"
        return None

    def fused(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any) -> Tensor:
        x_BNC, table = in_rows(hidden_states), self.scale_shift_table.float()
        # one line of vectors for each sample, or for each token
        vectors = (table.unsqueeze(0) + temb.float() if temb.ndim == 4 else table + temb.float()).flatten(0, -3)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (one.contiguous() for one in vectors.unbind(1))
        q, k, v = products(_qkv(self.attn1), x_BNC, Before(self.norm1.eps, 1 + scale, shift))
        x_BNC = _attend(self.attn1, q, k, v, rotary_emb, After(gate=gate, residual=x_BNC))
        (q,) = products([self.attn2.to_q], x_BNC, _affine(self.norm2))
        k, v = products([self.attn2.to_k, self.attn2.to_v], encoder_hidden_states)
        x_BNC = _attend(self.attn2, q, k, v, None, After(residual=x_BNC))
        return mlp(self.ffn, x_BNC, Before(self.norm3.eps, 1 + scale_mlp, shift_mlp), gate_mlp)


def _qkv(attention: WanAttention) -> list[Any]:
    return [attention.to_q, attention.to_k, attention.to_v]


def _affine(norm: nn.Module) -> Before:
    """A LayerNorm with its own weight and bias, or none at all."""
    if isinstance(norm, nn.Identity):
        return Before()
    return Before(norm.eps, norm.weight.float()[None], norm.bias.float()[None])  # type: ignore[arg-type,operator,index]


def _attend(attention: WanAttention, q: Tensor, k: Tensor, v: Tensor, rotary_emb: Any, after: After) -> Tensor:
    """Norms of queries and keys, rotary positions, softmax, the output's product."""
    q, k, v = (
        heads(part, attention.heads) for part in (rms_norm(attention.norm_q, q), rms_norm(attention.norm_k, k), v)
    )
    if rotary_emb is not None:
        q, k = (rotate_pairs(part, *rotary_emb) for part in (q, k))
    out_BNC = attend(attention.processor, q, k, v).to(q.dtype)
    return products([attention.to_out[0]], out_BNC, after=after)[0]
