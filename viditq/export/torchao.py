"""A pipeline whose denoisers diffusers loads with torchao alone: codes, scales and zero points as they are.

Symmetric weights become `Int8Tensor`, which multiplies integers; the others `IntxUnpackedToInt8Tensor`, which emulates
as our `fake` does. Either takes a byte for a code. The tensors describe themselves in the header of their file, in the
layout of torchao 0.18 (`torchao.prototype.safetensors`); torchao itself is not needed to write them.

Legend: O out_features, C in_features, G groups of a row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.export.folding import folded, opened
from viditq.export.pipeline_folder import export_pipeline, shard_file, write_index
from viditq.export.refusal import Refusal, raise_refused, refusals, refuse_correction
from viditq.files import atomic, is_whole, write_json
from viditq.mapped import Writer, header_bound
from viditq.models.adapter import ModelAdapter
from viditq.models.registry import find_class
from viditq.quant.artifact import StoredTensors, read_meta
from viditq.quant.artifact_writer import SHARD_BYTES, in_shards
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.execution.model_linears import shapes_of
from viditq.quant.numerics.packing import unpack

EMULATED = "quant=w8a8 (or w4a8), whose activations are asymmetric per token"
MULTIPLIED = "quant=w8a8 with quant/format@quant.weight=int8_channel_symmetric"
FULL_RANGE = "the same with quant/format@quant.activation=int8_token_full_range, its own symmetric grid"
CONFIG = {  # of quantizing anew, which nobody does: the tensors say what they are
    "quant_method": "torchao",
    "modules_to_not_convert": None,
    "quant_type": {
        "default": {
            "_type": "Int8DynamicActivationInt8WeightConfig",
            "_version": 2,
            "_data": {
                "act_mapping_type": {"_type": "MappingType", "_data": "ASYMMETRIC"},
                "weight_only_decode": False,
                "granularity": {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}},
                "set_inductor_config": True,
                "reduce_range": False,
            },
        }
    },
}


def export(artifact: Path, out: Path) -> None:
    """Write the folder `out`; errors as of `export_pipeline`, and for what torchao cannot hold exactly."""
    meta = read_meta(artifact)
    denoiser = ModelAdapter.from_dict(meta["model"]).build_denoiser()
    raise_refused("torchao", folded(artifact, meta, denoiser, partial(cannot_hold, denoiser=denoiser), False)[1], False)
    refuse_correction("torchao", meta)
    halves = sorted(layer for layer, dtype in meta["dtypes"].items() if dtype == "float16")
    if halves:
        raise UserError(
            f"--to torchao: {halves[0]} computes in float16, in which torchao's products overflow. Quantize with "
            "model.dtype=bfloat16 or float32."
        )
    export_pipeline(artifact, out, "torchao", write_part)


def cannot_hold(plan: QuantPlan, denoiser: nn.Module) -> dict[str, Refusal]:
    """Layer -> why it cannot go."""
    return refusals(plan, refusal, "quant/smoothing=static and dynamic activations")


def refusal(scheme: LayerScheme, layer: str) -> Refusal | None:
    """Why a layer cannot go as it is; None = it can."""
    weight, activation = scheme.weight, scheme.activation

    def because(field: str, value: object, why: str, preset: str = EMULATED) -> Refusal:
        return Refusal(layer, field, value, why, preset)

    if weight is None:
        return because("weight", None, "and torchao quantizes weights, or weights and activations")
    if weight.granularity == "tensor":
        return because("weight.granularity", "tensor", "and torchao has a scale for each row or group")
    if scheme.low_rank is not None:
        return because("low_rank", scheme.low_rank, "and torchao has no branch beside the codes")
    if activation is not None:
        full = activation.full_range and _multiplies(scheme)  # torchao's own symmetric grid
        for field, wanted in {"bits": 8, "symmetric": full, "granularity": "token", "dynamic": True}.items():
            if getattr(activation, field) != wanted:
                why = f"and torchao has it {wanted!r} where we agree on the grid"
                preset = FULL_RANGE if field == "symmetric" and _multiplies(scheme) else EMULATED
                return because(f"activation.{field}", getattr(activation, field), why, preset)
    names = [transform.name for transform in scheme.transforms]
    if names and (names not in (["smooth"], ["given_scale"]) or not _multiplies(scheme)):
        why = "which torchao has for symmetric weights with a scale per row alone, and only smoothing"
        return because("transforms", names, why, f"{MULTIPLIED} and quant/smoothing=static")
    return None


def _multiplies(scheme: LayerScheme) -> bool:
    """Whether it becomes an Int8Tensor."""
    weight = scheme.weight
    return scheme.activation is not None and weight is not None and weight.symmetric and weight.granularity == "channel"


@dataclass(frozen=True)
class _Entry:
    """One name of the float model's state. described: JSON of it; shapes: of its tensors in the file."""

    described: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    nbytes: int
    make: Callable[[], dict[str, Tensor]]


def write_part(folder: Path, config: Mapping[str, Any], dtype: str, artifact: Path, prefix: str = "") -> None:
    """One denoiser's folder, of which the files that are whole stay; as `viditq.export.diffusers.write_part`."""
    meta = read_meta(artifact)
    with init_empty_weights(include_buffers=False):
        denoiser = find_class(config["_class_name"]).from_config(config)
    tensors = opened(artifact, meta, denoiser, prefix, ())
    columns = {name: columns for name, (_, columns) in shapes_of(denoiser).items()}
    entries = _entries(tensors.plan, meta, tensors, prefix, columns)
    metadata = {"format": "pt", "tensor_names": json.dumps([*entries])}
    metadata |= {name: json.dumps(entry.described) for name, entry in entries.items()}
    shards = in_shards([(name, entry.nbytes) for name, entry in entries.items()], SHARD_BYTES)
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file, mine = shard_file(i, len(shards)), [entries[name] for name in names]
        weight_map |= {key: file for entry in mine for key in entry.shapes}
        if not is_whole(folder / file):
            _write(folder / file, mine, metadata)
    if len(shards) > 1:
        write_index(folder, sum(entry.nbytes for entry in entries.values()), weight_map)
    write_json(folder / "config.json", {**config, "quantization_config": CONFIG})


def _write(path: Path, entries: list[_Entry], metadata: Mapping[str, str]) -> None:
    shapes = {key: shape for entry in entries for key, shape in entry.shapes.items()}
    room = header_bound(shapes, sum(entry.nbytes for entry in entries)) + len(json.dumps(metadata)) + 32
    with atomic(path) as temporary, Writer(temporary, room) as file:
        file.metadata.update(metadata)
        for entry in entries:
            made = entry.make()
            for key in sorted(made, key=lambda key: (-made[key].dtype.itemsize, key)):
                file.add(key, made[key])


def _entries(
    plan: QuantPlan, meta: Mapping[str, Any], tensors: StoredTensors, prefix: str, columns: Mapping[str, int]
) -> dict[str, _Entry]:
    """Name in the float model's state -> what becomes of it. columns: in_features by layer."""
    state, entries = tensors.state(), dict[str, _Entry]()
    for full in (name for name in state if name.startswith(prefix) and ".variants." not in name):
        entries |= _plain(full, full.removeprefix(prefix), tensors)
    for full in (layer for layer in plan.layers if layer.startswith(prefix)):
        scheme, name = plan.scheme(full, 0), full.removeprefix(prefix)
        if scheme is None:  # a plan may name what it leaves in float
            entries |= _plain(f"{full}.variants.0.weight", f"{name}.weight", tensors)
        else:
            entries |= _layer(full, name, scheme, columns[name], meta["dtypes"][full], tensors)
    return entries


def _plain(stored: str, name: str, tensors: StoredTensors) -> dict[str, _Entry]:
    """A float tensor under its float name."""
    tensor = tensors.state()[stored]
    shapes = {name: tuple(tensor.shape)}
    return {name: _Entry({"_type": "Tensor"}, shapes, tensor.nbytes, lambda: {name: tensors.of(stored)})}


def _layer(
    full: str, name: str, scheme: LayerScheme, columns: int, dtype: str, tensors: StoredTensors
) -> dict[str, _Entry]:
    """A quantized weight under its float name."""
    start, state, weight = f"{full}.variants.0.", tensors.state(), scheme.weight
    assert weight is not None
    scale, smooth = state[f"{start}weight_scale"], state.get(f"{start}chain.0.scale")
    rows = len(state[f"{start}qweight"])
    groups = scale.numel() // rows
    multiplies = _multiplies(scheme)
    typed = {"_type": "torch.dtype", "_data": dtype}
    parts: dict[str, tuple[int, ...]] = {
        "qdata": (rows, columns),
        "scale": (rows, groups),
        "zero_point": (rows, groups),
    }
    if multiplies:
        activation = {"granularity": {"_type": "PerRow", "_data": {"dim": -1}}, "reduce_range": False}
        symmetric = scheme.activation is not None and scheme.activation.symmetric
        activation["mapping_type"] = {"_type": "MappingType", "_data": "SYMMETRIC" if symmetric else "ASYMMETRIC"}
        data: dict[str, Any] = {"block_size": [1, columns], "dtype": typed, "reduce_range": False}
        data["act_quant_kwargs"] = {"_type": "QuantizeTensorToInt8Kwargs", "_data": activation}
        parts |= {} if smooth is None else {"act_pre_scale": (columns,)}
        described = {"_type": "Int8Tensor", "_data": data, "_tensor_data_names": [*parts]}
    else:
        data = {"block_size": [1, columns // groups], "dtype": typed}
        data["target_dtype"] = {"_type": "torch.dtype", "_data": f"int{weight.bits}"}
        data["activation_quantization"] = None if scheme.activation is None else "int8_asym_per_token"
        described = {"_type": "IntxUnpackedToInt8Tensor", "_data": data, "_tensor_data_names": [*parts]}
    path, _, key = f"{name}.weight".rpartition(".")
    shapes = {f"{path}._{key}_{part}": shape for part, shape in parts.items()}
    nbytes = rows * columns + 5 * rows * groups + (4 * columns if "act_pre_scale" in parts else 0)
    make = partial(_made, f"{path}._{key}_", start, weight, columns, getattr(torch, dtype), tensors)
    return {f"{name}.weight": _Entry(described, shapes, nbytes, make)}


def _made(
    before: str, start: str, weight: QuantSpec, columns: int, dtype: torch.dtype, tensors: StoredTensors
) -> dict[str, Tensor]:
    """Codes counted from the middle, as signed bytes."""
    state = {name: tensors.of(name) for name in tensors.state() if name.startswith(start)}
    middle = 2 ** (weight.bits - 1)
    codes_OC = unpack(state[f"{start}qweight"], weight.bits, columns)
    scale_OG = state[f"{start}weight_scale"].float().flatten(1)
    zero_point = state.get(f"{start}weight_zero_point")
    zero_OG = torch.full_like(scale_OG, middle) if zero_point is None else zero_point.flatten(1)
    made = {
        "qdata": (codes_OC.to(torch.int16) - middle).to(torch.int8),
        "scale": scale_OG,
        "zero_point": (zero_OG.to(torch.int16) - middle).to(torch.int8),
    }
    smooth = state.get(f"{start}chain.0.scale")
    if smooth is not None:
        made["act_pre_scale"] = (1 / smooth.float()).to(dtype)
    return {f"{before}{part}": tensor.contiguous() for part, tensor in made.items()}
