"""LoRA files, as diffusers, PEFT and the models' own releases lay them out.

Legend: O out_features, C in_features, r rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.files import read_json

WEIGHT_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
PEFT_CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"  # of diffusers, in the header
DOWN = ("lora_A.weight", "lora_A.default.weight", "lora.down.weight", "lora_down.weight")
UP = ("lora_B.weight", "lora_B.default.weight", "lora.up.weight", "lora_up.weight")
DENOISERS = ("transformer", "unet")
OTHER_KINDS = {
    r"dora_scale|lora_magnitude_vector": "DoRA",
    r"hada_": "LoHa",
    r"lokr_": "LoKr",
    r"lora_B\.bias": "LoRA with biases",
    r"diff(_b)?$": "differences of whole weights",
}


class Update(NamedTuple):
    """What is added to one Linear: up_Or @ down_rC, alpha / r included. component: of the pipeline; layer: in it."""

    component: str
    layer: str
    down_rC: Tensor
    up_Or: Tensor


class _Key(NamedTuple):
    component: str
    layer: str
    part: str  # "down", "up" or "alpha"


def read_lora(pipeline: Any, path: Path, weight_name: str | None) -> tuple[list[Update], Path]:
    """The updates of a file, and which file; raises UserError for anything but a LoRA of this pipeline's layers."""
    file = find_file(path, weight_name)
    tensors, metadata = _read(file)
    tensors = _named_as_here(pipeline, tensors, file)
    config = _config(file, metadata)
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        component, layer, part = _parsed(pipeline, key, file)
        parts = found.setdefault((component, layer), {})
        if part in parts:
            raise UserError(
                f"{file} says two things of {component}.{layer}: it has {key}, and that under another name."
            )
        parts[part] = tensor
    if not found:
        raise UserError(f"{file} holds no tensors.")
    return [_update(*where, parts, config, file) for where, parts in found.items()], file


def moved_to(pipeline: Any, component: str, updates: list[Update], file: Path) -> list[Update]:
    """Updates of a denoiser as those of another; those of text encoders stay. Raises UserError if it lacks a layer."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    denoisers = [name for name in parts if name.startswith(DENOISERS)]
    if component not in denoisers:
        raise UserError(f"component={component!r} is no denoiser of this pipeline; it has {', '.join(denoisers)}.")
    found = [u._replace(component=component) if u.component in denoisers else u for u in updates]
    absent = [u.layer for u in found if not _has(parts[u.component], u.layer)]
    if absent:
        raise _stranger(pipeline, [f"{component}.{layer}" for layer in absent], file)
    return found


def find_file(path: Path, weight_name: str | None) -> Path:
    """The file itself, or the one in a folder; raises UserError where there is none, or none in particular."""
    if weight_name is not None:
        path = path / weight_name
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{path} is no .safetensors file: others may run code when they are read.")
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist: give a .safetensors file, or a folder with one.")
    there = sorted(path.glob("*.safetensors"))
    for name in WEIGHT_NAMES:
        if path / name in there:
            return path / name
    if len(there) != 1:
        names = ", ".join(one.name for one in there) or "none"
        raise UserError(f"{path} has no file of its own choice: give weight_name=, one of its files ({names}).")
    return there[0]


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(file, "pt") as stored:
            return {key: stored.get_tensor(key) for key in stored.keys()}, stored.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}): copy it again.") from error


def _config(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Ranks and alphas beside the tensors: of PEFT's folder, or in diffusers' header, by component."""
    beside = file.parent / PEFT_CONFIG
    if beside.is_file() and file.name == WEIGHT_NAMES[1]:
        return {"": _mapping(read_json(beside, "Copy it again."), f"{beside}")}
    try:
        told = json.loads(metadata.get(METADATA, "{}"))
    except ValueError as error:
        raise UserError(f"{METADATA} of {file} is no JSON ({error}): copy the file again.") from error
    found: dict[str, Any] = {}
    for key, value in _mapping(told, f"{METADATA} of {file}").items():
        component, _, field = key.partition(".")
        found.setdefault(component, {})[field] = value
    return found


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where} is {value!r}, where a mapping is needed: copy it again.")
    return value


def _named_as_here(pipeline: Any, tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Keys of an original release in diffusers' names, by the pipeline's own converter."""
    strangers = [key for key in tensors if _place(pipeline, key) is None]
    if not strangers:
        return tensors
    _refuse_other_kinds(strangers, file)
    if not hasattr(pipeline, "lora_state_dict"):
        raise _stranger(pipeline, strangers, file)
    try:
        converted: Any = pipeline.lora_state_dict(dict(tensors))
    except (KeyError, ValueError, RuntimeError, AttributeError) as error:
        raise _stranger(pipeline, strangers, file) from error
    return converted[0] if isinstance(converted, tuple) else converted


def _refuse_other_kinds(keys: Iterable[str], file: Path) -> None:
    for key in keys:
        for mark, kind in OTHER_KINDS.items():
            if re.search(rf"(^|\.)({mark})", key):
                raise UserError(f"{file} is no plain LoRA but {kind} ({key}), which is no sum of two small products.")


def _stranger(pipeline: Any, keys: list[str], file: Path) -> UserError:
    return UserError(
        f"{file} is no LoRA of this {type(pipeline).__name__}: it has no layer for {', '.join(keys[:3])}"
        f"{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}."
    )


def _parsed(pipeline: Any, key: str, file: Path) -> _Key:
    place = _place(pipeline, key)
    if place is None:
        _refuse_other_kinds([key], file)
        raise _stranger(pipeline, [key], file)
    return place


def _place(pipeline: Any, key: str) -> _Key | None:
    """Component, layer and part that a key names; None where the pipeline has no such layer."""
    for part, ends in (("down", DOWN), ("up", UP), ("alpha", ("alpha",))):
        for end in ends:
            if key.endswith(f".{end}"):
                where = _layer(pipeline, key.removesuffix(f".{end}"))
                return None if where is None else _Key(*where, part)
    return None


def _layer(pipeline: Any, name: str) -> tuple[str, str] | None:
    """With the component's name before it, with PEFT's or the releases' prefix, or bare: then of the denoiser."""
    components = {n: part for n, part in pipeline.components.items() if isinstance(part, nn.Module)}
    first, _, rest = name.partition(".")
    if first in components and _has(components[first], rest):
        return first, rest
    bare = name.removeprefix("base_model.model.").removeprefix("diffusion_model.")
    for component in DENOISERS:
        if component in components and _has(components[component], bare):
            return component, bare
    return None


def _has(part: nn.Module, layer: str) -> bool:
    try:
        return bool(layer) and part.get_submodule(layer) is not None
    except AttributeError:
        return False


def _update(component: str, layer: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], file: Path) -> Update:
    where = f"{component}.{layer}"
    if missing := [word for word in ("down", "up") if word not in parts]:
        raise UserError(f"{file} is not whole: {where} lacks its {missing[0]} projection.")
    down_rC, up_Or = parts["down"], parts["up"]
    if down_rC.ndim != 2 or up_Or.ndim != 2 or down_rC.shape[0] != up_Or.shape[1] or not len(down_rC):
        shapes = f"{list(down_rC.shape)} and {list(up_Or.shape)}"
        raise UserError(f"{file}: the projections of {where} do not belong together, they are {shapes}.")
    if strange := [t.dtype for t in (down_rC, up_Or) if not t.is_floating_point()]:
        kind = str(strange[0]).removeprefix("torch.")
        raise UserError(f"{file}: the projections of {where} are {kind}, whose numbers stand for nothing known.")
    told = _mapping(config.get(component) or config.get("") or {}, f"what {file} says of {component}")
    factor = _factor(layer, len(down_rC), parts.get("alpha"), told, file)
    down_rC, up_Or = down_rC.float(), up_Or.float() * factor
    if not (torch.isfinite(down_rC).all() and torch.isfinite(up_Or).all()):
        raise UserError(f"{file}: {where} holds NaN or infinity.")
    return Update(component, layer, down_rC, up_Or)


def _factor(layer: str, rank: int, alpha: Tensor | None, config: Mapping[str, Any], file: Path) -> float:
    """alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732); 1 where nothing is said."""
    if config.get("use_dora"):
        raise UserError(f"{file} is no plain LoRA but DoRA (use_dora), which is no sum of two small products.")
    try:
        given = _alpha(layer, config) if alpha is None else float(alpha)
    except (TypeError, ValueError, AttributeError, RuntimeError, re.error) as error:
        raise UserError(
            f"{file}: what it says of the alpha of {layer} is no number ({error}): copy it again."
        ) from error
    return (rank if given is None else given) / (rank**0.5 if config.get("use_rslora") else rank)


def _alpha(layer: str, config: Mapping[str, Any]) -> float | None:
    """That of PEFT's configuration, whose patterns are regular expressions."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    matching = [value for end, value in patterns.items() if re.search(rf"(^|\.){end}$", layer)]
    given = matching[0] if matching else config.get("lora_alpha")
    return None if given is None else float(given)
