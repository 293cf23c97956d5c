"""Quantize image and video diffusion transformers, and judge what it cost."""

from typing import TYPE_CHECKING, Any

from viditq.interop.register import register

if TYPE_CHECKING:
    from viditq.loading import load_quantized

__all__ = ["load_quantized"]
register()


def __getattr__(name: str) -> Any:
    if name == "load_quantized":  # imported when asked for: it pulls in diffusers, which `viditq.quant` does not need
        from viditq.loading import load_quantized

        return load_quantized
    raise AttributeError(f"module 'viditq' has no attribute {name!r}")
