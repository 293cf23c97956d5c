"""Open-Sora v1.0's official checkpoint -> STDiT; only qkv changes its name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from viditq.errors import UserError
from viditq.models.official import QKV, TABLES, build_from, read_checkpoint, shapes_of, split_rows
from viditq.models.stdit import STDiT


def opensora_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """STDiT's tensors from a checkpoint with q, k, v merged or split; the position tables are left out."""
    return split_rows({k: v for k, v in tensors.items() if k not in TABLES}, "qkv", QKV)


def opensora_config(
    tensors: Mapping[str, Tensor],
    num_heads: int = 16,
    size: int | None = None,
    num_frames: int | None = None,
    position_scale: float | None = None,
) -> dict[str, Any]:
    """STDiT's configuration from a checkpoint's shapes.

    size: pixels, num_frames: what to compute position tables for; None: as the stored tables say. position_scale: what
    positions in space are divided by; None: size / 512, as the original does. Raises UserError where nothing tells.
    """
    shapes = shapes_of(tensors, num_heads, size)
    if num_frames is None and "pos_embed_temporal" not in tensors:
        raise UserError("The checkpoint holds no temporal position table; give the number of frames.")
    if "y_embedder.y_embedding" not in tensors:
        raise UserError("y_embedder.y_embedding, the null caption, is missing. Give Open-Sora's official file.")
    return {
        "sample_size": shapes.sample_size,
        "num_frames": num_frames or tensors["pos_embed_temporal"].shape[1],
        "in_channels": shapes.in_channels,
        "out_channels": shapes.out_channels,
        "patch_size": shapes.patch_size,
        "num_layers": shapes.num_layers,
        "num_attention_heads": num_heads,
        "attention_head_dim": shapes.channels // num_heads,
        "caption_channels": shapes.caption_channels,
        "max_caption_tokens": len(tensors["y_embedder.y_embedding"]),
        "space_scale": position_scale or shapes.sample_size / 64,
    }


def load_opensora(path: Path, **settings: Any) -> STDiT:
    """STDiT on an official checkpoint's weights, mapped from the file. settings: as of `opensora_config`.

    Raises UserError unless names and shapes are those of the model.
    """
    tensors = read_checkpoint(path)
    return build_from(STDiT, opensora_config(tensors, **settings), opensora_names(tensors), path)
