"""A whole pipeline in diffusers' layout whose denoisers vllm-omni serves in int8: W = code * scale by row, activations
quantized by token, symmetric.

Where a plan leaves activations in float in the first or last steps, `diffusion_step_policy` says so beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from viditq.export.cost import told_cost
from viditq.export.float_weights import FloatWeights
from viditq.export.folding import folded
from viditq.export.part import Again, Entry, Part, row_scale, signed_codes
from viditq.export.part_files import write_files
from viditq.export.pipeline_folder import export_pipeline, is_exported
from viditq.export.refusal import Refusal, difference, raise_refused, refusals, refuse_correction
from viditq.export.requantize import ACTIVATION, WEIGHT
from viditq.export.step_policy import core_of, kept_weights, step_policy
from viditq.interop.folder import CHANGED
from viditq.models.adapter import ModelAdapter
from viditq.quant.artifact import read_meta
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.scheme import LayerScheme

TARGET, NEAREST = "vllm-omni", "quant=w8a8_sym with quant/smoothing=none"
BY_NOISE_LEVEL = f"{NEAREST} and segments=[0, 1], or activations in float in the first and last steps alone"
UNTRIED = (
    "vllm-omni itself was not run: where it joins q, k and v it may take the scales of three rows alone (read in its "
    "source). Compare samples with viditq's before you serve it: docs/deploy.md"
)
WHOLE = {"to_out.0": "to_out"}  # what it calls Linears that have another name in diffusers


def export(artifact: Path, out: Path, requantize: bool = False) -> None:
    """Write the folder `out`; errors as of `export_pipeline`, and for what int8 cannot hold (unless it is to be
    quantized again).
    """
    meta = read_meta(artifact)
    refuse_correction(TARGET, meta)
    if is_exported(artifact, out, TARGET):
        return
    adapter, policy, again, changed = ModelAdapter.from_dict(meta["model"]), dict[str, Any](), None, ""
    denoiser = adapter.build_denoiser()
    tensors, refused = folded(artifact, meta, denoiser, partial(cannot_hold, denoiser=denoiser), requantize)
    if not requantize:
        raise_refused(TARGET, refused, True)
    plan, core = tensors.plan, core_of(tensors.plan)
    if refused or core.others:
        weights = FloatWeights(denoiser, plan, tensors, core.first)
        again = Again(dict.fromkeys(refused, LayerScheme(WEIGHT, ACTIVATION)), weights) if refused else None
    if core.others:
        changed = kept_weights(TARGET, plan, core, weights, again, requantize)
        if again is not None and not changed:  # to the same weights, with other activations
            changed = f"quantized again: {len(again.schemes)} Linears"
        policy = step_policy(adapter, plan, core)
    elif again is not None:
        changed = told_cost(artifact, adapter, again.schemes, again.weights)[CHANGED]
    print(UNTRIED)
    write = partial(write_part, segment=core.first, again=again, policy=policy)
    export_pipeline(artifact, out, TARGET, write, changed)


def cannot_hold(plan: QuantPlan, denoiser: nn.Module) -> dict[str, Refusal]:
    """Layer -> why it cannot go."""
    return refusals(core_of(plan).plan, refusal, BY_NOISE_LEVEL)


def refusal(scheme: LayerScheme, layer: str) -> Refusal | None:
    """Why a layer cannot go as it is; None = it can."""
    weight, activation = scheme.weight, scheme.activation
    names = [transform.name for transform in scheme.transforms]
    wrong: list[tuple[bool, str, object, str]] = [
        (weight is None, "weight", None, "and weights are int8 there"),
        (activation is None, "activation", None, "and every int8 layer quantizes its input"),
        (scheme.low_rank is not None, "low_rank", scheme.low_rank, "and there is no branch beside the codes"),
        (bool(names), "transforms", names, "and inputs are taken as they are"),
    ]
    alike = WEIGHT
    if weight is not None:  # of any bits, with one scale for all of it as well
        alike = replace(WEIGHT, bits=weight.bits, granularity="tensor" if weight.granularity == "tensor" else "channel")
    for side, other in (("activation", difference(activation, ACTIVATION)), ("weight", difference(weight, alike))):
        if other is not None:
            field, found, value = other
            wrong.append((True, f"{side}.{field}", found, f"and there it is {value!r}"))
    return next((Refusal(layer, field, value, why, NEAREST) for is_so, field, value, why in wrong if is_so), None)


def write_part(
    folder: Path,
    config: Mapping[str, Any],
    dtype: str,
    artifact: Path,
    prefix: str = "",
    segment: int = 0,
    again: Again | None = None,
    policy: Mapping[str, Any] | None = None,
) -> None:
    """One denoiser's folder; as `viditq.export.diffusers.write_part`. segment: of the plan, whose schemes go."""
    part = Part(artifact, prefix, config, segment, again)
    entries = [*part.entries(), *(entry for layer in part.schemes for entry in _layer(part, layer))]
    ignored = [name for layer in part.shapes if layer not in part.schemes for name in _called(layer)]
    quantization: dict[str, Any] = {"quant_method": "int8", "activation_scheme": "dynamic", "ignored_layers": ignored}
    if policy:
        quantization["runtime"] = {"diffusion_step_policy": {**policy, "scope": [prefix.rstrip(".") or folder.name]}}
    write_files(folder, {**config, "quantization_config": quantization}, entries)


def _layer(part: Part, layer: str) -> list[Entry]:
    spec, shape = part.schemes[layer].weight, part.shapes[layer]
    assert spec is not None
    return [
        Entry(f"{layer}.weight", torch.int8, shape, lambda: signed_codes(part.quantized(layer), spec.bits)),
        Entry(f"{layer}.weight_scale", torch.float32, (shape[0], 1), lambda: row_scale(part.grid(layer)[0], shape[0])),
    ]


def _called(layer: str) -> list[str]:
    """A layer's name here and, where it has another one there, that."""
    found = next((end for end in WHOLE if layer.endswith(f".{end}")), None)
    return [layer] if found is None else [layer, layer.removesuffix(found) + WHOLE[found]]
