"""Attention backends: our own on a CPU (native), or through diffusers' dispatch (xformers, flash, sage)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.models import attention_dispatch as dispatch
from torch import nn

from viditq.errors import UserError
from viditq.models.native import op, processors

BACKENDS = ("native", "xformers", "flash", "sage")
PACKAGES = {"xformers": "xformers", "flash": "flash-attn", "sage": "sageattention"}
HALF_ONLY = ("flash", "sage")


def check_attention(name: str | None, dtype: str) -> None:
    """Raises UserError for an unknown backend, a package or a CPU that is not there, or a dtype it cannot take."""
    if name is None:
        return
    if name not in BACKENDS:
        raise UserError(f"model.attention={name!r} is unknown; choose null or one of {', '.join(BACKENDS)}.")
    if name == "native":
        op.check_machine()
        return
    try:
        dispatch._check_attention_backend_requirements(dispatch.AttentionBackendName(name))
    except RuntimeError as error:
        raise UserError(
            f"model.attention={name} needs the package {PACKAGES[name]}: {error} Or leave model.attention=null."
        ) from error
    if name in HALF_ONLY and dtype == "float32":
        raise UserError(f"model.attention={name} computes in half precision only: set model.dtype=bfloat16 or float16.")


def check_dispatches(name: str | None, denoiser: nn.Module) -> None:
    """Raises UserError if the denoiser, or a layer of it that is named, cannot use this backend."""
    native = name == "native"
    takes = processors.takes_native if native else _dispatches
    if name is not None and not any(takes(processor) for processor in _processors(denoiser)):
        raise UserError(
            f"model.attention={name}: {type(denoiser).__name__} does not choose its attention by diffusers' dispatch"
            f"{' or call torch' if native else ''}; leave model.attention=null."
        )
    if native:
        processors.check_heads(denoiser)


def check_device(name: str | None, device: str) -> None:
    """Raises UserError for a backend that does not compute on this kind of device."""
    if name == "native" and device != "cpu":
        raise UserError(f"model.attention=native computes on a CPU, and this run on {device}. {op.INSTEAD}")
    if name in PACKAGES and device == "cpu":
        raise UserError(
            f"model.attention={name} computes on a GPU, and this run on a CPU. Use trainer=gpu where there is one, "
            "model.attention=native, or null."
        )


def set_attention(name: str | None, denoiser: nn.Module) -> None:
    """Let `denoiser` compute attention with this backend; other models of the process keep theirs."""
    if name == "native":
        processors.use_native(denoiser)
    elif name is not None and any(_dispatches(processor) for processor in _processors(denoiser)):
        with _active_backend_kept():
            denoiser.set_attention_backend(name)  # type: ignore[operator]


def _processors(denoiser: nn.Module) -> list[Any]:
    return [getattr(module, "processor", None) for module in denoiser.modules()]


def _dispatches(processor: Any) -> bool:
    return hasattr(processor, "_attention_backend")


@contextmanager
def _active_backend_kept() -> Iterator[None]:
    """`set_attention_backend` also changes the default of the whole process, and so of runs after this one."""
    registry = dispatch._AttentionBackendRegistry
    before, _ = registry.get_active_backend()
    try:
        yield
    finally:
        registry.set_active_backend(before)
