"""PixArt-alpha's and -sigma's official checkpoints -> diffusers' PixArtTransformer2DModel."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import PixArtTransformer2DModel
from torch import Tensor

from viditq.models.official import QKV, TABLES, build_from, read_checkpoint, shapes_of, split_rows

PIXART_NAMES = (  # official -> diffusers, the first that matches a whole part of the name
    (r"^x_embedder\.proj\.", "pos_embed.proj."),
    (r"^t_embedder\.mlp\.0\.", "adaln_single.emb.timestep_embedder.linear_1."),
    (r"^t_embedder\.mlp\.2\.", "adaln_single.emb.timestep_embedder.linear_2."),
    (r"^t_block\.1\.", "adaln_single.linear."),
    (r"^csize_embedder\.mlp\.0\.", "adaln_single.emb.resolution_embedder.linear_1."),
    (r"^csize_embedder\.mlp\.2\.", "adaln_single.emb.resolution_embedder.linear_2."),
    (r"^ar_embedder\.mlp\.0\.", "adaln_single.emb.aspect_ratio_embedder.linear_1."),
    (r"^ar_embedder\.mlp\.2\.", "adaln_single.emb.aspect_ratio_embedder.linear_2."),
    (r"^y_embedder\.y_proj\.fc1\.", "caption_projection.linear_1."),
    (r"^y_embedder\.y_proj\.fc2\.", "caption_projection.linear_2."),
    (r"^final_layer\.linear\.", "proj_out."),
    (r"^final_layer\.scale_shift_table$", "scale_shift_table"),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"transformer_blocks.\1.attn1.to_out.0."),
    (r"^blocks\.(\d+)\.attn\.([qkv])\.", r"transformer_blocks.\1.attn1.to_\2."),
    (r"^blocks\.(\d+)\.cross_attn\.proj\.", r"transformer_blocks.\1.attn2.to_out.0."),
    (r"^blocks\.(\d+)\.cross_attn\.q_linear\.", r"transformer_blocks.\1.attn2.to_q."),
    (r"^blocks\.(\d+)\.cross_attn\.([kv])_linear\.", r"transformer_blocks.\1.attn2.to_\2."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"transformer_blocks.\1.ff.net.0.proj."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"transformer_blocks.\1.ff.net.2."),
    (r"^blocks\.(\d+)\.scale_shift_table$", r"transformer_blocks.\1.scale_shift_table"),
)
NOT_IN_PIXART = (*TABLES, "y_embedder.y_embedding")  # diffusers guides by the encoded empty prompt


def pixart_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PixArtTransformer2DModel's parameters from a checkpoint of PixArt-alpha or -sigma."""
    split = split_rows({k: v for k, v in tensors.items() if k not in NOT_IN_PIXART}, "qkv", QKV)
    split = split_rows(split, "kv_linear", ("k_linear", "v_linear"))
    return {_renamed(name): tensor for name, tensor in split.items()}


def _renamed(name: str) -> str:
    for pattern, replacement in PIXART_NAMES:
        new, count = re.subn(pattern, replacement, name)
        if count:
            return new
    return name  # check_fits refuses it by its own name


def pixart_config(
    tensors: Mapping[str, Tensor], num_heads: int = 16, size: int | None = None, position_scale: float | None = None
) -> dict[str, Any]:
    """PixArtTransformer2DModel's configuration from a checkpoint's shapes.

    size: pixels; None: as the stored position table says (UserError without one). position_scale: None for size / 512.
    Micro conditions (alpha at 1024) are told by their embedders.
    """
    shapes = shapes_of(tensors, num_heads, size)
    return {
        "num_attention_heads": num_heads,
        "attention_head_dim": shapes.channels // num_heads,
        "in_channels": shapes.in_channels,
        "out_channels": shapes.out_channels,
        "num_layers": shapes.num_layers,
        "cross_attention_dim": shapes.channels,
        "attention_bias": True,
        "sample_size": shapes.sample_size,
        "patch_size": shapes.patch_size,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "interpolation_scale": position_scale or shapes.sample_size / 64,
        "use_additional_conditions": "csize_embedder.mlp.0.weight" in tensors,
        "caption_channels": shapes.caption_channels,
    }


def load_pixart(path: Path, **settings: Any) -> Any:
    """PixArtTransformer2DModel on an official checkpoint's weights, mapped from the file.

    settings: as of `pixart_config`. Raises UserError unless names and shapes are those of the model.
    """
    tensors = read_checkpoint(path)
    return build_from(PixArtTransformer2DModel, pixart_config(tensors, **settings), pixart_names(tensors), path)
