"""A whole pipeline whose denoisers diffusers loads with SDNQ: codes, scales and low-rank branches as they are.

Activations in float: any weights. Activations of 8 bits, symmetric by token: weights with a scale a row, of which SDNQ
multiplies the integers. Written without SDNQ, for the layout of 0.2.8.

Legend: O out_features, C in_features, r rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from viditq.export.cost import told_cost
from viditq.export.float_weights import FloatWeights
from viditq.export.folding import folded
from viditq.export.part import Again, Entry, Part
from viditq.export.part_files import write_files
from viditq.export.pipeline_folder import export_pipeline, is_exported
from viditq.export.refusal import Refusal, difference, raise_refused, refusals, refuse_correction
from viditq.export.requantize import ACTIVATION, WEIGHT
from viditq.export.sdnq_layout import packed_shape, stored_grid, stored_weight
from viditq.interop.folder import CHANGED
from viditq.models.adapter import ModelAdapter
from viditq.quant.artifact import read_meta
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.execution.model_linears import shapes_of

TARGET, VERSION = "sdnq", "0.2.8"
NEAREST = "quant=w8a8_sym (or w4a8_sym, or weights only) with quant/smoothing=none"
SMALLEST, MULTIPLE = 32, 16  # sides of a weight whose integers it multiplies
ALL = {  # without the last three it leaves small layers in float, and those that it knows by name
    "quantized_matmul_dtype": "int8",
    "dequantize_fp32": True,
    "add_skip_keys": False,
    "minimum_allowed_numel": 1,
    "minimum_allowed_channel_size": 1,
}


def export(artifact: Path, out: Path, requantize: bool = False) -> None:
    """Write the folder `out`; errors as of `export_pipeline`, and for what SDNQ cannot hold (unless it is to be
    quantized again).
    """
    meta = read_meta(artifact)
    refuse_correction(TARGET, meta)
    if is_exported(artifact, out, TARGET):
        return
    adapter, again, changed = ModelAdapter.from_dict(meta["model"]), None, ""
    denoiser = adapter.build_denoiser()
    shapes = shapes_of(denoiser)
    tensors, refused = folded(artifact, meta, denoiser, partial(cannot_hold, denoiser=denoiser), requantize)
    if not requantize:
        raise_refused(TARGET, refused, True)
    elif refused:
        weights = FloatWeights(denoiser, tensors.plan, tensors)
        again = Again({layer: _scheme_again(tensors.plan, layer, shapes[layer]) for layer in refused}, weights)
        changed = told_cost(artifact, adapter, again.schemes, weights)[CHANGED]
    export_pipeline(artifact, out, TARGET, partial(write_part, again=again), changed)


def cannot_hold(plan: QuantPlan, denoiser: nn.Module) -> dict[str, Refusal]:
    """Layer -> why it cannot go."""
    return refusals(plan, partial(refusal, shapes=shapes_of(denoiser)), f"{NEAREST} and segments=[0, 1]")


def refusal(scheme: LayerScheme, layer: str, shapes: Mapping[str, tuple[int, int]]) -> Refusal | None:
    """Why a layer cannot go as it is; None = it can. shapes: [O, C] of all Linears."""
    weight, activation = scheme.weight, scheme.activation
    if weight is None:
        return Refusal(layer, "weight", None, "and SDNQ quantizes weights", NEAREST)
    if scheme.transforms:
        names = [transform.name for transform in scheme.transforms]
        return Refusal(layer, "transforms", names, "and SDNQ takes inputs as they are", NEAREST)
    if (other := difference(activation, ACTIVATION)) is not None:
        field, found, value = other
        return Refusal(layer, f"activation.{field}", found, f"and SDNQ has it {value!r}", NEAREST)
    if activation is not None and weight.granularity == "group":
        why = "beside quantized activations, where SDNQ would round these weights again at each call"
        return Refusal(layer, "weight.granularity", "group", why, NEAREST)
    if activation is not None and not _multiplies(shapes[layer]):
        why = f"whose integers SDNQ does not multiply: sides have to be multiples of {MULTIPLE}, from {SMALLEST} on"
        return Refusal(layer, "shape", list(shapes[layer]), why, "the same with weights only, by a rule for this layer")
    if weight.bits < 8 and packed_shape(shapes[layer], weight.bits) is None:
        why = f"and codes of {weight.bits} bits fill no whole blocks there"
        return Refusal(layer, "shape", list(shapes[layer]), why, "8 bits, by a rule for this layer")
    return None


def _multiplies(shape: tuple[int, int]) -> bool:
    return all(side >= SMALLEST and side % MULTIPLE == 0 for side in shape)


def _scheme_again(plan: QuantPlan, layer: str, shape: tuple[int, int]) -> LayerScheme:
    schemes = [plan.schemes[name] for name in plan.layers[layer] if name is not None]
    quantizes = _multiplies(shape) and any(scheme.activation is not None for scheme in schemes)
    return LayerScheme(WEIGHT, ACTIVATION if quantizes else None)


def write_part(
    folder: Path,
    config: Mapping[str, Any],
    dtype: str,
    artifact: Path,
    prefix: str = "",
    again: Again | None = None,
) -> None:
    """One denoiser's folder; as `viditq.export.diffusers.write_part`."""
    part = Part(artifact, prefix, config, again=again)
    entries = [*part.entries(), *(entry for layer in part.schemes for entry in _layer(part, layer))]
    settings = {f"{layer}.weight": _settings(scheme) for layer, scheme in part.schemes.items()}
    common = dict(Counter(tuple(s.items()) for s in settings.values()).most_common(1)[0][0])
    quantization: dict[str, Any] = {"quant_method": TARGET, "sdnq_version": VERSION, **ALL, **common}
    quantization["modules_to_not_convert"] = [f"{name}.weight" for name in part.shapes if name not in part.schemes]
    quantization["modules_quant_config"] = {name: own for name, own in settings.items() if own != common}
    write_files(folder, {**config, "quantization_config": quantization}, entries)


def _settings(scheme: LayerScheme) -> dict[str, Any]:
    weight = scheme.weight
    assert weight is not None
    return {
        "weights_dtype": f"{'int' if weight.symmetric else 'uint'}{weight.bits}",
        "group_size": weight.group_size or -1,
        "use_quantized_matmul": scheme.activation is not None,
        "use_svd": scheme.low_rank is not None,
        "svd_rank": scheme.low_rank or 32,
    }


def _layer(part: Part, layer: str) -> list[Entry]:
    """The tensors of one Linear but its bias."""
    scheme, (rows, columns) = part.schemes[layer], part.shapes[layer]
    spec = scheme.weight
    assert spec is not None
    groups = columns // (spec.group_size or columns)
    multiplied = scheme.activation is not None
    turned = multiplied and spec.bits == 8
    grid = (rows, groups, 1) if groups > 1 else (1, rows) if turned else (rows, 1)
    dtype = torch.int8 if spec.bits == 8 and spec.symmetric else torch.uint8
    shape = _weight_shape(spec, rows, columns, groups, turned)
    entries = [
        Entry(f"{layer}.weight", dtype, shape, lambda: _codes(part, layer, spec, groups, turned)),
        Entry(f"{layer}.scale", torch.float32, grid, lambda: stored_grid(part.grid(layer)[0], rows, turned)),
    ]
    if not spec.symmetric:
        entries.append(Entry(f"{layer}.zero_point", torch.float32, grid, lambda: _zero(part, layer, rows, turned)))
    for name, field in (("svd_up", "low_rank_up"), ("svd_down", "low_rank_down")) if scheme.low_rank else ():
        side = part.tensor(layer, field).shape
        shape = (side[1], side[0]) if multiplied else (side[0], side[1])
        make = partial(_branch, part, layer, field, multiplied)
        entries.append(Entry(f"{layer}.{name}", torch.float32, shape, make))
    return entries


def _weight_shape(spec: QuantSpec, rows: int, columns: int, groups: int, turned: bool) -> tuple[int, ...]:
    if spec.bits < 8:
        found = packed_shape((rows, columns), spec.bits)
        assert found is not None
        return found
    return (rows, groups, columns // groups) if groups > 1 else (columns, rows) if turned else (rows, columns)


def _codes(part: Part, layer: str, spec: QuantSpec, groups: int, turned: bool) -> Tensor:
    return stored_weight(part.quantized(layer), spec.bits, spec.symmetric, groups, turned)


def _zero(part: Part, layer: str, rows: int, turned: bool) -> Tensor:
    """What is added to code * scale."""
    scale, zero_point = part.grid(layer)
    assert zero_point is not None
    return stored_grid(-zero_point.float() * scale.float(), rows, turned)


def _branch(part: Part, layer: str, field: str, turned: bool) -> Tensor:
    factor = part.tensor(layer, field).float()
    return factor.T.contiguous() if turned else factor
