"""ComfyUI's file of a denoiser: names of the model's original release, rows that it joins (q, k, v) taken apart again.

A layer's format stands beside it (`NAME.comfy_quant`), or in the header (`_quantization_metadata`), or both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.export.comfy_file import LAYERS, MARKER
from viditq.export.comfy_formats import Marker
from viditq.export.release_names import Origin
from viditq.files import stored_metadata
from viditq.importing.comfy_layers import ComfyLayer, check_format
from viditq.importing.denoiser import ImportedDenoiser
from viditq.importing.float8 import FLOAT8, SCALED
from viditq.importing.layer import ImportedLayer
from viditq.importing.origins import PREFIX, origins_of, rows_of, without_prefix
from viditq.mapped import mapped_tensors
from viditq.quant.execution.model_linears import shapes_of

AS_FLOATS = "`viditq import FILE --model MODEL --out FOLDER` makes a folder for model.denoiser_path of it."


def read_comfy(path: Path, denoiser: nn.Module) -> ImportedDenoiser:
    """denoiser: as it was built, on meta. Raises UserError for everything that is not exactly one of our schemes."""
    tensors, left_out = without_prefix(mapped(path))
    layers = markers_of([path], tensors)
    for layer, marker in layers.items():
        check_format(layer, marker)
    if not layers:
        raise UserError(f"{path} {_why_unmarked(tensors)}")
    fields = _fields(tensors, layers)
    inside = {name for own in fields.values() for name in own.values()} | {f"{layer}.{MARKER}" for layer in layers}
    inside -= {f"{layer}.weight" for layer in layers}
    whole = {name: tensor for name, tensor in tensors.items() if name not in inside}
    origins, extras = origins_of(denoiser, whole, "ComfyUI")
    imported: dict[str, ImportedLayer] = {}
    floats: dict[str, Tensor] = {}
    for target, origin in origins.items():
        layer = target.removesuffix(".weight")
        if layer in layers and target.endswith(".weight"):
            own = {end: tensors[name] for end, name in fields[layer].items()}
            imported |= _quantized(layer, layers[layer], own, origin, denoiser)
        else:
            parts = rows_of(tensors[target], origin, denoiser)
            floats |= {name: rows.of(tensors[target]) for name, rows in parts.items()}
    return ImportedDenoiser("comfyui", imported, floats, [*left_out, *extras])


def mapped(path: Path) -> dict[str, Tensor]:
    """Its tensors; raises UserError where it is damaged."""
    try:
        return mapped_tensors(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is truncated or no safetensors file ({error}); download it again") from error


def markers_of(paths: Sequence[Path], tensors: Mapping[str, Tensor]) -> dict[str, Marker]:
    """Layer -> its format, from both places; raises UserError where they differ, or name what is not there.

    paths: the file, or all that the tensors are from.
    """
    path = paths[0]
    beside = {
        name.removesuffix(f".{MARKER}"): _mapping(path, name, tensor.view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
        if name.endswith(f".{MARKER}")
    }
    told = [_mapping(path, LAYERS, stored_metadata(file).get(LAYERS, "{}")) for file in paths]
    header = {
        name.removeprefix(PREFIX): _mapping(path, f"{LAYERS} of {name}", json.dumps(marker))
        for its in told
        for name, marker in _mapping(path, LAYERS, json.dumps(its.get("layers", {}))).items()
    }
    for layer in beside.keys() & header.keys():
        if beside[layer] != header[layer]:
            raise UserError(
                f"{path} says two things of {layer}: {beside[layer]} beside it, {header[layer]} in the header"
            )
    found = beside | header
    for layer in found:
        if f"{layer}.weight" not in tensors:
            raise UserError(f"{path} marks {layer} as quantized and has no {layer}.weight; download it again")
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
    if SCALED in tensors or dtypes & {*FLOAT8}:
        return f"holds 8-bit floating-point weights, which are read as a float model: {AS_FLOATS}"
    if torch.int8 in dtypes:
        return "holds int8 tensors that nothing says the format of (comfy_quant), so that they cannot be read."
    return f"holds no quantized layer: {AS_FLOATS}"


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
    denoiser: nn.Module,
) -> dict[str, ImportedLayer]:
    """The Linears whose rows lie in one tensor."""
    shapes = shapes_of(denoiser)
    parts = [name.removesuffix(".weight") for name in origin.names]
    no_linear = next((part for part in parts if part not in shapes), None)
    if no_linear is not None:
        raise UserError(
            f"{layer} is quantized in the file, and {no_linear} is no Linear of the model, but another layer"
        )
    found = rows_of(fields["weight"], origin, denoiser)
    shape = (sum(shapes[part][0] for part in parts), shapes[parts[0]][1])
    rows = {name.removesuffix(".weight"): its for name, its in found.items()}
    return ComfyLayer(layer, marker, fields, shape).parts(rows)
