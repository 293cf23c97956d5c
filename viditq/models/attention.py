"""Attention backends through diffusers' dispatch: native, xformers, flash, sage."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.models import attention_dispatch as dispatch
from torch import nn

from viditq.errors import UserError

BACKENDS = ("native", "xformers", "flash", "sage")
PACKAGES = {"xformers": "xformers", "flash": "flash-attn", "sage": "sageattention"}
HALF_ONLY = ("flash", "sage")


def check_attention(name: str | None, dtype: str) -> None:
    """Raises UserError for an unknown backend, a package that is not installed, or a dtype it cannot take."""
    if name is None:
        return
    if name not in BACKENDS:
        raise UserError(f"model.attention={name!r} is unknown; choose null or one of {', '.join(BACKENDS)}.")
    try:
        dispatch._check_attention_backend_requirements(dispatch.AttentionBackendName(name))
    except RuntimeError as error:
        raise UserError(
            f"model.attention={name} needs the package {PACKAGES[name]}: {error} Or choose model.attention=native."
        ) from error
    if name in HALF_ONLY and dtype == "float32":
        raise UserError(f"model.attention={name} computes in half precision only: set model.dtype=bfloat16 or float16.")


def check_dispatches(name: str | None, denoiser: nn.Module) -> None:
    """Raises UserError if the denoiser's attention does not go through diffusers' dispatch (native is what it does)."""
    processors = [getattr(module, "processor", None) for module in denoiser.modules()]
    if name not in (None, "native") and not any(hasattr(p, "_attention_backend") for p in processors):
        raise UserError(
            f"model.attention={name}: {type(denoiser).__name__} does not choose its attention by diffusers' dispatch; "
            "leave model.attention=null."
        )


def set_attention(name: str | None, denoiser: nn.Module) -> None:
    """Let `denoiser` compute attention with this backend; other models of the process keep theirs."""
    processors = [getattr(module, "processor", None) for module in denoiser.modules()]
    if name is not None and any(hasattr(p, "_attention_backend") for p in processors):
        with _active_backend_kept():
            denoiser.set_attention_backend(name)  # type: ignore[operator]


@contextmanager
def _active_backend_kept() -> Iterator[None]:
    """`set_attention_backend` also changes the default of the whole process, and so of runs after this one."""
    registry = dispatch._AttentionBackendRegistry
    before, _ = registry.get_active_backend()
    try:
        yield
    finally:
        registry.set_active_backend(before)
