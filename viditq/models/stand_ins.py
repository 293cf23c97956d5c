"""Parts of a pipeline without their weights: their configuration, which other parts and the pipeline's code ask for."""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace
from typing import Any, get_args

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import Tensor, nn

from viditq.models.parts import TEXT, part_class

CPU = torch.device("cpu")


def stand_in(adapter: Any, name: str) -> nn.Module | None:
    """A model of diffusers from its config.json, parameters on the meta device; None for what is no such model."""
    cls = part_class(adapter.index()[name])
    if not _is_kind(cls, ModelMixin):
        return None
    with init_empty_weights(include_buffers=False):
        model: nn.Module = cls.from_config(cls.load_config(adapter.part_folder(name, weights=False)))
    return nn.Module.to(model, adapter.torch_dtype)  # diffusers' own warns of what matters to weights only


def beside_text(adapter: Any) -> dict[str, Any]:
    """Part -> its stand-in, of the neural networks that encode no prompts; None for those that are not diffusers' own.

    Processors, schedulers and whatever else has no weights are not among them: prompts may be encoded with them.
    """
    parts = {name: part_class(adapter.index()[name]) for name in adapter.components if not name.startswith(TEXT)}
    return {name: stand_in(adapter, name) for name, cls in parts.items() if _is_kind(cls, nn.Module)}


def _is_kind(cls: Any, kind: type) -> bool:
    return inspect.isclass(cls) and issubclass(cls, kind)


def compute_on_cpu(pipeline: Any) -> Any:
    """The pipeline, computing there, whatever the first of its parts lies on: nothing is computed on stand-ins."""
    cls = type(pipeline)
    on_cpu = property(lambda _: CPU)
    devices: dict[str, Any] = {"_execution_device": on_cpu, "device": on_cpu}
    if hasattr(cls, "_get_execution_device"):  # Cosmos 3 looks for itself, at its denoiser
        devices["_get_execution_device"] = lambda _: CPU
    pipeline.__class__ = type(cls.__name__, (cls,), devices)
    return pipeline


def pass_on(model: nn.Module) -> nn.Module:
    """A stand-in whose forward hands on what it is given first, as often as its signature says that it returns it."""
    several = get_args(inspect.signature(model.forward, eval_str=True).return_annotation)
    count = len(several) if several and set(several) == {Tensor} else 0

    @functools.wraps(model.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        first = next(iter([*args, *kwargs.values()]))
        return (first,) * count if count else first

    model.forward = forward
    return model


_latent_shapes: dict[tuple[Any, ...], torch.Size] = {}  # of what a VAE is shown; following a clip takes 10 seconds


def stand_in_encoders(pipeline: Any, shown: list[Tensor]) -> None:
    """Let a pipeline of stand-ins encode pictures: to zeros, of the size that its VAE gives.

    shown: what the VAE is given is appended.
    """
    if hasattr(pipeline, "encode_image") and "image_encoder" in pipeline.components:  # else it is the VAE's
        pipeline.encode_image = lambda *args, **kwargs: torch.zeros(1, 1, 1)
    vae = getattr(pipeline, "vae", None)
    if vae is None or not hasattr(vae, "encode") or "encode" in vars(vae):  # stands in already
        return
    encode = vae.encode
    vae._hf_hook = SimpleNamespace(execution_device=CPU)  # as of an offloaded part: what it is given lies there

    def encoded(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        shown.append(x)
        known = (type(vae), str(vae.config), vae.dtype, x.shape)
        if known not in _latent_shapes:
            out = encode(torch.empty(x.shape, dtype=vae.dtype, device="meta"))
            _latent_shapes[known] = (out.latent if hasattr(out, "latent") else out.latent_dist.mode()).shape
        return _Encoded(torch.empty(_latent_shapes[known], device="meta"))

    vae.encode = encoded
    if hasattr(vae, "_encode"):
        _stand_in_moments(vae, shown)


def _stand_in_moments(vae: Any, shown: list[Tensor]) -> None:
    """The same of what AnyFlow asks for: mean and spread side by side."""
    encode = vae._encode

    def encoded(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not x.is_meta:  # else by `vae.encode` itself
            shown.append(x)
        out: Tensor = encode(x.to("meta", vae.dtype), *args, **kwargs)
        return out if x.is_meta else torch.zeros(out.shape)

    vae._encode = encoded


def stand_in_sketch(pipeline: Any) -> None:
    """Let a pipeline that draws tokens with a language model before it denoises (GLM-Image) find them all 0."""
    if not hasattr(pipeline, "generate_prior_tokens"):
        return
    patch = pipeline.vae_scale_factor * pipeline.transformer.config.patch_size

    def drawn(*, height: int, width: int, **kwargs: Any) -> tuple[Tensor, None, None]:
        return torch.zeros(1, height // patch * (width // patch), dtype=torch.long), None, None

    pipeline.generate_prior_tokens = drawn


class Unchecked:
    """In place of a checker of prompts, where nothing is made."""

    def to(self, *args: Any, **kwargs: Any) -> Unchecked:
        """Of no device."""
        return self

    def check_text_safety(self, prompt: str) -> bool:
        """The prompt is made up."""
        return True


class _Encoded:
    """What autoencoders return, whichever of them."""

    def __init__(self, latent: Tensor) -> None:
        self.latent = self.mean = torch.zeros(latent.shape)
        self.latent_dist = self

    def __getitem__(self, place: int) -> _Encoded:
        """As of the tuple that some take it for."""
        return self

    def mode(self) -> Tensor:
        """The likeliest latents."""
        return self.latent

    def sample(self, generator: Any = None) -> Tensor:
        """Latents drawn at random."""
        return self.latent
