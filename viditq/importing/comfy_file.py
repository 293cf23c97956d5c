"""ComfyUI's file of a denoiser: names of the model's original release, rows that it joins (q, k, v) taken apart again.

A layer's format stands beside it (`NAME.comfy_quant`), or in the header (`_quantization_metadata`), or both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.export.comfy_file import LAYERS, MARKER
from viditq.export.comfy_formats import Marker
from viditq.export.release_extras import left_out_of
from viditq.export.release_names import Origin
from viditq.export.releases import RELEASES
from viditq.files import stored_metadata
from viditq.importing.comfy_layers import ComfyLayer, Rows, check_format
from viditq.importing.denoiser import ImportedDenoiser, check_names
from viditq.importing.layer import ImportedLayer
from viditq.mapped import mapped_tensors
from viditq.quant.execution.model_linears import shapes_of

PREFIX = "model.diffusion_model."
SCALED_FLOAT8 = "scaled_fp8"


def read_comfy(path: Path, denoiser: nn.Module) -> ImportedDenoiser:
    """denoiser: as it was built, on meta. Raises UserError for everything that is not exactly one of our schemes."""
    tensors, left_out = without_prefix(mapped(path))
    layers = _markers(path, tensors)
    origins = origins_of(denoiser, {name.rpartition(".")[0] for name in tensors})
    shapes, fields = shapes_of(denoiser), _fields(tensors, layers)
    extras = [name for name in tensors if name in left_out_of(type(denoiser).__name__)]
    inside = {name for own in fields.values() for name in own.values()} | {f"{layer}.{MARKER}" for layer in layers}
    plain = [name for name in tensors if name not in inside and name not in extras]
    whole = [*plain, *(f"{layer}.weight" for layer in layers)]
    check_names(whole, [*origins], f"{type(denoiser).__name__} of ComfyUI")
    imported: dict[str, ImportedLayer] = {}
    floats: dict[str, Tensor] = {}
    for target, origin in origins.items():
        layer = target.removesuffix(".weight")
        if layer in layers and target.endswith(".weight"):
            imported |= _quantized(
                layer, layers[layer], {end: tensors[n] for end, n in fields[layer].items()}, origin, shapes
            )
        else:
            floats |= parts_of(tensors[target], origin, denoiser)
    return ImportedDenoiser("comfyui", imported, floats, [*left_out, *extras])


def mapped(path: Path) -> dict[str, Tensor]:
    """Its tensors; raises UserError where it is damaged."""
    try:
        return mapped_tensors(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is truncated or no safetensors file ({error}); download it again") from error


def without_prefix(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Those of the denoiser; and the names of what a checkpoint of a whole pipeline has beside it."""
    if not any(name.startswith(PREFIX) for name in tensors):
        return dict(tensors), []
    mine = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    return mine, [name for name in tensors if not name.startswith(PREFIX)]


def _markers(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Marker]:
    """Layer -> its format, from both places."""
    beside = {
        name.removesuffix(f".{MARKER}"): _mapping(path, name, tensor.view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
        if name.endswith(f".{MARKER}")
    }
    told = _mapping(path, LAYERS, stored_metadata(path).get(LAYERS, "{}"))
    header = {
        name.removeprefix(PREFIX): _mapping(path, f"{LAYERS} of {name}", json.dumps(marker))
        for name, marker in _mapping(path, LAYERS, json.dumps(told.get("layers", {}))).items()
    }
    for layer in beside.keys() & header.keys():
        if beside[layer] != header[layer]:
            raise UserError(
                f"{path} says two things of {layer}: {beside[layer]} beside it, {header[layer]} in the header"
            )
    found = beside | header
    for layer, marker in found.items():
        check_format(layer, marker)
        if f"{layer}.weight" not in tensors:
            raise UserError(f"{path} marks {layer} as quantized and has no {layer}.weight; download it again")
    if not found:
        raise UserError(f"{path} {_why_unmarked(tensors)}")
    return found


def _mapping(path: Path, where: str, text: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: what {where} says is no JSON ({error}); download the file again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: what {where} says is {value!r}, where a mapping is needed")
    return value


def _why_unmarked(tensors: Mapping[str, Tensor]) -> str:
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if SCALED_FLOAT8 in tensors or dtypes & {torch.float8_e4m3fn, torch.float8_e5m2}:
        return "holds 8-bit floating-point weights, which viditq has not; imported are ComfyUI's integer formats."
    if torch.int8 in dtypes:
        return "holds int8 tensors that nothing says the format of (comfy_quant), so that they cannot be read."
    return "holds no quantized layer."


def origins_of(denoiser: nn.Module, layers: set[str]) -> dict[str, Origin]:
    """Name in the file -> where its rows go; files may also have diffusers' own names."""
    names = [*denoiser.state_dict()]
    release = RELEASES.get(type(denoiser).__name__)
    if release is None or all(name.rpartition(".")[0] in layers for name in names):
        return {name: Origin((name,)) for name in names}
    return release.origins(names)


def _fields(tensors: Mapping[str, Tensor], layers: Mapping[str, Marker]) -> dict[str, dict[str, str]]:
    """Layer -> what belongs to its codes: end of the name -> name. Its marker and bias do not."""
    found: dict[str, dict[str, str]] = {layer: {} for layer in layers}
    for name in tensors:
        layer, _, end = name.rpartition(".")
        if layer in found and end not in ("bias", MARKER):
            found[layer][end] = name
    return found


def _quantized(
    layer: str,
    marker: Marker,
    fields: Mapping[str, Tensor],
    origin: Origin,
    shapes: Mapping[str, tuple[int, int]],
) -> dict[str, ImportedLayer]:
    """The Linears whose rows lie in one tensor."""
    parts = [name.removesuffix(".weight") for name in origin.names]
    no_linear = next((part for part in parts if part not in shapes), None)
    if no_linear is not None:
        raise UserError(
            f"{layer} is quantized in the file, and {no_linear} is no Linear of the model, but another layer"
        )
    rows, first = dict[str, Rows](), 0
    for part in parts:
        rows[part] = Rows(first, first + shapes[part][0], origin.swapped)
        first += shapes[part][0]
    return ComfyLayer(layer, marker, fields, (first, shapes[parts[0]][1])).parts(rows)


def parts_of(tensor: Tensor, origin: Origin, denoiser: nn.Module) -> dict[str, Tensor]:
    """diffusers' name -> its rows of a float tensor. Rows that do not fit are left for the check of shapes."""
    if origin.names[1:]:
        state, parts, first = denoiser.state_dict(), dict[str, Tensor](), 0
        for name in origin.names:
            parts[name] = Rows(first, first + len(state[name]), origin.swapped).of(tensor)
            first += len(state[name])
        return parts
    return {origin.names[0]: Rows(0, len(tensor), True).of(tensor) if origin.swapped else tensor}
