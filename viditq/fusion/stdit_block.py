"""STDiT's block: attention in space and over time under one gate, cross-attention, an mlp.

Legend: B samples, T frames, S patches of a frame, N = T S, L caption tokens, C channels.
"""

from __future__ import annotations

from torch import Tensor

from viditq.fusion.attend import attend, heads
from viditq.fusion.block import FusedBlock, all_fusible
from viditq.fusion.patches import in_rows
from viditq.models.stdit_blocks import Block, SelfAttention
from viditq.quant.execution.linear import products
from viditq.quant.execution.surroundings import After, Before


class FusedStditBlock(FusedBlock, Block):
    """q, k, v in one product, norm and modulation in the quantizer, GELU, gates, residuals behind the products."""

    @classmethod
    def reason_against(cls, block: Block) -> str | None:
        own = [one for a in (block.attn, block.attn_temp) for one in (a.q, a.k, a.v, a.proj)]
        cross = [block.cross_attn.q_linear, block.cross_attn.kv_linear, block.cross_attn.proj]
        return all_fusible(block, [*own, *cross, block.mlp.fc1, block.mlp.fc2])

    def unknown_call(
        self, x_BNC: Tensor, y_BLC: Tensor, t_B6C: Tensor, mask_BL: Tensor | None, frames: int, frame_1TC: Tensor | None
    ) -> str | None:
        return None

    def fused(
        self, x_BNC: Tensor, y_BLC: Tensor, t_B6C: Tensor, mask_BL: Tensor | None, frames: int, frame_1TC: Tensor | None
    ) -> Tensor:
        x_BNC = in_rows(x_BNC)
        vectors = (self.scale_shift_table.float() + t_B6C.float()).unbind(1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (one.contiguous() for one in vectors)
        size_BTSC = (len(x_BNC), frames, -1, x_BNC.shape[-1])
        x_BNC = _attention(self.attn, x_BNC, x_BNC.shape, frames, Before(self.norm1.eps, 1 + scale, shift), gate, x_BNC)
        # in the order of time from here to the sum, so that gate and residual stay behind the product
        x_BSTC = x_BNC.reshape(size_BTSC).transpose(1, 2).contiguous()
        in_time = x_BSTC if frame_1TC is None else x_BSTC + frame_1TC
        size_STC = x_BSTC.flatten(0, 1).shape
        x_BSTC = _attention(self.attn_temp, in_time, size_STC, 1, Before(), gate, x_BSTC).reshape(x_BSTC.shape)
        x_BNC = x_BSTC.transpose(1, 2).reshape(x_BNC.shape)
        cross = self.cross_attn
        (q,), (kv,) = products([cross.q_linear], x_BNC), products([cross.kv_linear], y_BLC)  # type: ignore[list-item]
        k, v = kv.chunk(2, dim=-1)
        mask = None if mask_BL is None else mask_BL[:, None, None]
        q, k, v = (heads(part, cross.num_heads) for part in (q, k, v))
        out = attend(cross.processor, q, k, v, mask)
        (x_BNC,) = products([cross.proj], out, after=After(residual=x_BNC))  # type: ignore[list-item]
        before = Before(self.norm2.eps, 1 + scale_mlp, shift_mlp)
        (hidden,) = products([self.mlp.fc1], x_BNC, before, After("gelu_tanh"))  # type: ignore[list-item]
        return products([self.mlp.fc2], hidden, after=After(gate=gate_mlp, residual=x_BNC))[0]  # type: ignore[list-item]


def _attention(
    attention: SelfAttention,
    x: Tensor,
    shape: tuple[int, ...],
    frames: int,
    before: Before,
    gate: Tensor,
    residual: Tensor,
) -> Tensor:
    """residual + gate * attention(before(x)) among the tokens of a frame; shape: [B, N, C], N over `frames` frames."""
    x_BNC = x.reshape(shape)
    q, k, v = products([attention.q, attention.k, attention.v], x_BNC, before)  # type: ignore[list-item]
    q, k, v = (heads(part.reshape(len(part) * frames, -1, part.shape[-1]), attention.num_heads) for part in (q, k, v))
    out = attend(attention.processor, q, k, v).reshape(x_BNC.shape)
    after = After(gate=gate, residual=residual.reshape(shape))
    return products([attention.proj], out, after=after)[0]  # type: ignore[list-item]
