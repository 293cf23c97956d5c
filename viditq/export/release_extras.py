"""Tensors that programs expect in a release's file and diffusers does not keep."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from viditq.models.adapter import ModelAdapter
from viditq.models.official_pixart import NOT_IN_PIXART
from viditq.models.registry import find_class

PIXART_TOKENS = 120
LEFT_OUT = {"PixArtTransformer2DModel": NOT_IN_PIXART, "ZImageTransformer2DModel": ("norm_final.weight",)}


def left_out_of(denoiser: str) -> tuple[str, ...]:
    """The release's names that diffusers' class of this name has no place for."""
    return LEFT_OUT.get(denoiser, ())


def extra_tensors(adapter: ModelAdapter, denoiser: nn.Module) -> dict[str, Tensor]:
    """Release's name -> tensor, of those that diffusers computes or leaves out."""
    if type(denoiser).__name__ != "PixArtTransformer2DModel":
        return {}
    # ComfyUI tells the size that positions are scaled for from one, the length of captions from the other; the values
    # of the latter are only trained with.
    positions: Tensor = denoiser.get_submodule("pos_embed").get_buffer("pos_embed")
    channels: int = denoiser.config.caption_channels  # type: ignore[union-attr, assignment]
    return {"pos_embed": positions, "y_embedder.y_embedding": torch.zeros(_caption_tokens(adapter), channels)}


def _caption_tokens(adapter: ModelAdapter) -> int:
    if adapter.max_tokens is not None:
        return adapter.max_tokens
    arguments = inspect.signature(find_class(adapter.pipeline).__call__).parameters
    default = arguments["max_sequence_length"].default if "max_sequence_length" in arguments else PIXART_TOKENS
    return int(default)
