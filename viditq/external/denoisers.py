"""The denoisers of a pipeline as another library quantizes them, loaded by diffusers itself."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from torch import nn

from viditq.errors import UserError
from viditq.external.policy import ExternalQuantization
from viditq.models.adapter import ModelAdapter
from viditq.models.registry import find_class
from viditq.models.roles import FLOAT
from viditq.models.weight_files import variant_of
from viditq.quant.execution.model_linears import linear_names


def load_denoisers(adapter: ModelAdapter, policy: ExternalQuantization) -> nn.Module:
    """As `ModelAdapter.denoiser_of` has them; raises UserError with the library's own words where it cannot."""
    parts = {name: _load(adapter, policy, name).eval().requires_grad_(False) for name in adapter.denoiser_names}
    return nn.ModuleDict(parts) if len(parts) > 1 else parts[adapter.denoiser_names[0]]


def source_of(adapter: ModelAdapter, policy: ExternalQuantization, name: str) -> Path:
    """The folder or file that a denoiser is read from."""
    if policy.path is None:
        return adapter.part_folder(name, weights=True)
    if policy.takes == "gguf":
        return policy.place
    inside = policy.place / name
    return inside if (inside / "config.json").is_file() else policy.place


def check_source(adapter: ModelAdapter, policy: ExternalQuantization) -> None:
    """Raises UserError for a file that diffusers cannot read as this model's, a folder that lacks a denoiser, and for
    settings that the library itself refuses.
    """
    for name in adapter.denoiser_names if policy.config is not None else ():
        with _its_own_words(adapter, policy, name):
            _config(adapter, policy, name)
    for name in adapter.denoiser_names if policy.path is not None else ():
        cls, source = find_class(adapter.index()[name][1]), source_of(adapter, policy, name)
        if policy.takes == "gguf" and len(adapter.denoiser_names) > 1:
            raise UserError(f"quant.policy.path={policy.path} is one denoiser, and {adapter.name} has several.")
        if policy.takes == "gguf" and not hasattr(cls, "from_single_file"):
            raise UserError(
                f"diffusers reads no GGUF files of {cls.__name__}. It does of Flux, SD3, Wan, LTX, HunyuanVideo, "
                "Qwen-Image and others that have from_single_file."
            )
        if policy.takes == "folder" and not (source / "config.json").is_file():
            raise UserError(f"{policy.path} holds no {name}: {name}/config.json is missing there.")


def _load(adapter: ModelAdapter, policy: ExternalQuantization, name: str) -> Any:
    cls, source = find_class(adapter.index()[name][1]), source_of(adapter, policy, name)
    settings: dict[str, Any] = {"torch_dtype": adapter.torch_dtype, "local_files_only": True}
    with _its_own_words(adapter, policy, name):
        if policy.config is not None:
            settings["quantization_config"] = _config(adapter, policy, name)
        if policy.takes == "gguf":
            return cls.from_single_file(str(source), config=str(adapter.part_folder(name, weights=False)), **settings)
        variant = variant_of(source, adapter.variant if policy.path is None else None)
        return cls.from_pretrained(source, variant=variant, use_safetensors=True, **settings)


@contextmanager
def _its_own_words(adapter: ModelAdapter, policy: ExternalQuantization, name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever a library raises
        raise UserError(
            f"{policy.who} cannot give a quantized {name} of {adapter.name}: {type(error).__name__}: {error}. "
            f"{policy.instead}".rstrip()
        ) from error


def _config(adapter: ModelAdapter, policy: ExternalQuantization, name: str) -> Any:
    """The quantization_config, told which modules stay in float."""
    words = skipped_words(adapter, policy, name)
    given = {policy.skips: words} if policy.skips and words else {}
    return instantiate(policy.config, **given, _convert_="all")


def skipped_words(adapter: ModelAdapter, policy: ExternalQuantization, name: str) -> list[str]:
    """What the library is told to leave in float of one denoiser, as it writes it.

    A last word that a Linear to be quantized has too is left out, as both would stay in float.
    """
    if not policy.keep_float or policy.skips is None:
        return []
    roles = adapter.linear_roles(linear_names(adapter.build_denoiser()))
    prefix = f"{name}." if len(adapter.denoiser_names) > 1 else ""
    mine = {layer.removeprefix(prefix): role for layer, role in roles.items() if layer.startswith(prefix)}
    kept = _words(policy, [layer for layer, role in mine.items() if role == FLOAT])
    other = _words(policy, [layer for layer, role in mine.items() if role != FLOAT])
    return [word for word in kept if word not in other]


def _words(policy: ExternalQuantization, layers: Sequence[str]) -> list[str]:
    words = (policy.skip_as.format(name=layer, last=layer.rpartition(".")[2]) for layer in layers)
    return list(dict.fromkeys(words))
