"""Quantize image and video diffusion transformers, and judge what it cost."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from viditq.loading import load_quantized
    from viditq.lora import add_lora, lora_scales, remove_lora, set_lora_scale

__all__ = ["add_lora", "load_quantized", "lora_scales", "remove_lora", "set_lora_scale"]


def __getattr__(name: str) -> Any:
    # imported when asked for: it pulls in diffusers, which `viditq.quant` does not need
    if name in __all__:
        return getattr(import_module("viditq.loading" if name == "load_quantized" else "viditq.lora"), name)
    raise AttributeError(f"module 'viditq' has no attribute {name!r}")
