"""Quantize image and video diffusion transformers, and judge what it cost."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from viditq.interop.register import register

if TYPE_CHECKING:
    from viditq.interop.backend import set_backend
    from viditq.interop.quantizer import ViditqConfig
    from viditq.loading import load_quantized
    from viditq.lora import add_lora, lora_scales, merge_lora, remove_lora, set_lora_scale

__all__ = [
    "ViditqConfig",
    "add_lora",
    "load_quantized",
    "lora_scales",
    "merge_lora",
    "remove_lora",
    "set_backend",
    "set_lora_scale",
]
# Imported when asked for: they pull in diffusers, which neither `viditq.quant` nor a refused command line needs.
_PLACES = {
    "ViditqConfig": "viditq.interop.quantizer",
    "load_quantized": "viditq.loading",
    "set_backend": "viditq.interop.backend",
}
register()


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(_PLACES.get(name, "viditq.lora")), name)
    raise AttributeError(f"module 'viditq' has no attribute {name!r}")
