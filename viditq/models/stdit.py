"""STDiT-XL/2, the denoiser of Open-Sora v1.0, as a diffusers model.

Legend: B samples, c latent channels, T frames, h, w latent size, L caption tokens, C channels, p patch size.
"""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from viditq.models.positions import spatial_table, temporal_table
from viditq.models.stdit_blocks import Block, CaptionEmbedder, FinalLayer, PatchEmbedder, TimestepEmbedder


class STDiT(ModelMixin, ConfigMixin):
    """Diffusion transformer with spatial and temporal attention in turn; the defaults are Open-Sora v1.0's at 512.

    sample_size: latent height and width that the position tables are made for at once (others work too). space_scale,
    time_scale: what positions are divided by (0.5 in space for the model trained at 256). Parameter names are those
    of the official checkpoint with q, k, v in place of qkv (docs/opensora.md).
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        num_frames: int = 16,
        in_channels: int = 4,
        out_channels: int = 8,
        patch_size: int = 2,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        caption_channels: int = 4096,
        max_caption_tokens: int = 120,
        space_scale: float = 1.0,
        time_scale: float = 1.0,
    ) -> None:
        super().__init__()
        channels = num_attention_heads * attention_head_dim
        self.x_embedder = PatchEmbedder(in_channels, channels, patch_size)
        self.t_embedder = TimestepEmbedder(channels)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))
        self.y_embedder = CaptionEmbedder(caption_channels, channels, max_caption_tokens)
        self.blocks = nn.ModuleList(Block(channels, num_attention_heads, mlp_ratio) for _ in range(num_layers))
        self.final_layer = FinalLayer(channels, patch_size**2 * out_channels)
        grid = sample_size // patch_size
        self.register_buffer("pos_embed", spatial_table(grid, grid, channels, space_scale), persistent=False)
        self.register_buffer("pos_embed_temporal", temporal_table(num_frames, channels, time_scale), persistent=False)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Noise and variance [B, out_channels, T, h, w] of latents [B, c, T, h, w] at timesteps [B] in 0..1000.

        encoder_hidden_states: [B, L, caption channels]. encoder_attention_mask: [B, L] or [1, L], nonzero where there
        is a token; None: everywhere. Raises ValueError for sizes that no whole patches cover.
        """
        rows, columns = self._grid(hidden_states)
        frames, dtype = hidden_states.shape[2], hidden_states.dtype
        place_1SC, frame_1TC = self._tables(frames, rows, columns, hidden_states)
        x_BNC = self.x_embedder(hidden_states)
        x_BNC = (x_BNC.unflatten(1, (frames, -1)) + place_1SC).flatten(1, 2)
        t_BC = self.t_embedder(timestep.expand(len(x_BNC)), dtype)
        t_B6C = self.t_block(t_BC).unflatten(1, (6, -1))
        y_BLC = self.y_embedder(encoder_hidden_states)
        mask_BL = None if encoder_attention_mask is None else encoder_attention_mask.bool().expand(len(x_BNC), -1)
        for index, block in enumerate(self.blocks):
            x_BNC = block(x_BNC, y_BLC, t_B6C, mask_BL, frames, frame_1TC if index == 0 else None)
        out = self._unpatchify(self.final_layer(x_BNC, t_BC), frames, rows, columns)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)

    def _grid(self, latents: Tensor) -> tuple[int, int]:
        patch = self.config.patch_size
        height, width = latents.shape[-2:]
        if height % patch or width % patch:
            raise ValueError(f"a latent of {height} x {width} does not divide into patches of {patch} x {patch}")
        return height // patch, width // patch

    def _tables(self, frames: int, rows: int, columns: int, like: Tensor) -> tuple[Tensor, Tensor]:
        place_1SC, frame_1TC = self.pos_embed, self.pos_embed_temporal
        channels = place_1SC.shape[-1]
        if rows != columns or rows * columns != place_1SC.shape[1]:
            place_1SC = spatial_table(rows, columns, channels, self.config.space_scale)
        if frames != frame_1TC.shape[1]:
            frame_1TC = temporal_table(frames, channels, self.config.time_scale)
        return place_1SC.to(like), frame_1TC.to(like)

    def _unpatchify(self, x_BNP: Tensor, frames: int, rows: int, columns: int) -> Tensor:
        patch = self.config.patch_size
        x = x_BNP.reshape(len(x_BNP), frames, rows, columns, patch, patch, self.config.out_channels)
        return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(
            len(x), self.config.out_channels, frames, rows * patch, columns * patch
        )

    @property
    def null_caption(self) -> Tensor:
        """The embedding that stands for no prompt, [1, max_caption_tokens, caption channels]."""
        return torch.as_tensor(self.y_embedder.y_embedding)[None]
