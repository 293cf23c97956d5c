"""Parts of STDiT, named as in the official checkpoint (only qkv is three Linears, so that each has its own scales).

Legend: B samples, T frames, S patches of a frame, N = T S, L caption tokens, C channels, H heads, D = C / H.
"""

from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from viditq.models.positions import timestep_features

TIMESTEP_CHANNELS = 256


def modulate(x_BNC: Tensor, shift_B1C: Tensor, scale_B1C: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return x_BNC * (1 + scale_B1C) + shift_B1C


class Dispatch:
    """Scaled dot product attention by the backend that diffusers' `set_attention_backend` chose."""

    def __init__(self) -> None:
        self._attention_backend: Any = None
        self._parallel_config: Any = None

    def __call__(self, q_BNHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, mask_B11L: Tensor | None = None) -> Tensor:
        return dispatch_attention_fn(q_BNHD, k_BLHD, v_BLHD, attn_mask=mask_B11L, backend=self._attention_backend)


class _Attention(nn.Module, AttentionModuleMixin):
    _supports_qkv_fusion = False

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.processor = num_heads, channels // num_heads, Dispatch()
        self.proj = nn.Linear(channels, channels)

    def _heads(self, x_BNC: Tensor) -> Tensor:
        return x_BNC.unflatten(-1, (self.num_heads, -1))


class SelfAttention(_Attention):
    """Attention among the tokens of one frame, or the frames of one place."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__(channels, num_heads)
        self.q, self.k, self.v = (nn.Linear(channels, channels) for _ in range(3))

    def forward(self, x_BNC: Tensor) -> Tensor:
        out_BNHD = self.processor(*(self._heads(linear(x_BNC)) for linear in (self.q, self.k, self.v)))
        return self.proj(out_BNHD.flatten(2))


class CrossAttention(_Attention):
    """Attention to the caption; `mask_BL` (bool) leaves its padding out. Rows of kv_linear: k, then v."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__(channels, num_heads)
        self.q_linear, self.kv_linear = nn.Linear(channels, channels), nn.Linear(channels, 2 * channels)

    def forward(self, x_BNC: Tensor, y_BLC: Tensor, mask_BL: Tensor | None) -> Tensor:
        k_BLHD, v_BLHD = (self._heads(part) for part in self.kv_linear(y_BLC).chunk(2, dim=-1))
        mask_B11L = None if mask_BL is None else mask_BL[:, None, None]
        out_BNHD = self.processor(self._heads(self.q_linear(x_BNC)), k_BLHD, v_BLHD, mask_B11L)
        return self.proj(out_BNHD.flatten(2))


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, channels: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Spatial attention, temporal attention, cross-attention, MLP; the timestep shifts, scales and gates.

    The temporal branch has no norm of its own and shares the spatial branch's gate.
    """

    def __init__(self, channels: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.attn = SelfAttention(channels, num_heads)
        self.cross_attn = CrossAttention(channels, num_heads)
        self.mlp = Mlp(channels, int(channels * mlp_ratio), channels)
        self.scale_shift_table = nn.Parameter(torch.randn(6, channels) / channels**0.5)
        self.attn_temp = SelfAttention(channels, num_heads)

    def forward(
        self, x_BNC: Tensor, y_BLC: Tensor, t_B6C: Tensor, mask_BL: Tensor | None, frames: int, frame_1TC: Tensor | None
    ) -> Tensor:
        """frame_1TC: added to the temporal branch's input, in the first block only."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (self.scale_shift_table + t_B6C).chunk(6, dim=1)
        size_BTSC = (len(x_BNC), frames, -1, x_BNC.shape[-1])
        in_space = modulate(self.norm1(x_BNC), shift, scale).reshape(size_BTSC).flatten(0, 1)
        x_BNC = x_BNC + gate * self.attn(in_space).reshape(x_BNC.shape)
        x_BSTC = x_BNC.reshape(size_BTSC).transpose(1, 2)
        in_time = x_BSTC.flatten(0, 1) if frame_1TC is None else x_BSTC.flatten(0, 1) + frame_1TC
        over_time = self.attn_temp(in_time).reshape(x_BSTC.shape).transpose(1, 2)
        x_BNC = x_BNC + gate * over_time.reshape(x_BNC.shape)
        x_BNC = x_BNC + self.cross_attn(x_BNC, y_BLC, mask_BL)
        return x_BNC + gate_mlp * self.mlp(modulate(self.norm2(x_BNC), shift_mlp, scale_mlp))


class PatchEmbedder(nn.Module):
    """Square patches of every frame: [B, c, T, h, w] -> [B, N, C]."""

    def __init__(self, in_channels: int, channels: int, patch_size: int) -> None:
        super().__init__()
        size = (1, patch_size, patch_size)
        self.proj = nn.Conv3d(in_channels, channels, kernel_size=size, stride=size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Timesteps [B] -> [B, C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIMESTEP_CHANNELS, channels), nn.SiLU(), nn.Linear(channels, channels))

    def forward(self, timestep_B: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(timestep_features(timestep_B, TIMESTEP_CHANNELS).to(dtype))


class CaptionEmbedder(nn.Module):
    """Text embeddings [B, L, caption channels] -> [B, L, C]; y_embedding is the learned null caption."""

    def __init__(self, caption_channels: int, channels: int, max_tokens: int) -> None:
        super().__init__()
        self.register_buffer("y_embedding", torch.zeros(max_tokens, caption_channels))
        self.y_proj = Mlp(caption_channels, channels, channels)

    def forward(self, y: Tensor) -> Tensor:
        return self.y_proj(y)


class FinalLayer(nn.Module):
    """Norm, shift and scale by the timestep embedding itself, Linear: [B, N, C] -> [B, N, p p out]."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(channels, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(channels, out)
        self.scale_shift_table = nn.Parameter(torch.randn(2, channels) / channels**0.5)

    def forward(self, x_BNC: Tensor, t_BC: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + t_BC[:, None]).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x_BNC), shift, scale))
