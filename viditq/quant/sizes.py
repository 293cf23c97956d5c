"""Bytes counted from shapes alone: weights before and after quantization, files, statistics.

Nothing is computed and no weight is needed: a quantized denoiser is laid out on the meta device, as loading an artifact
does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from viditq.mapped import NAMES
from viditq.quant.artifact import FORMAT_VERSION, META, PLAN
from viditq.quant.calibration.observers import blank_state
from viditq.quant.calibration.statistics import shared_tensor
from viditq.quant.convert import build_quantized
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.execution.backends import get_backend
from viditq.quant.execution.linear import QuantLinear, quant_linears
from viditq.quant.execution.model_linears import tied_names
from viditq.quant.execution.variant import Variant

KINDS = {
    "qweight": "codes",
    "weight_scale": "scales",
    "weight_tensor_scale": "scales",
    "weight_zero_point": "zero_points",
}
FLOATS_LAST = {torch.float64: 1}  # the format's order of types of one size, as far as both are stored
Entry = tuple[torch.dtype, Sequence[int]]


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a quantized denoiser's tensors as they lie in memory, by kind.

    transforms: of the chains, static activation ranges and low-rank branches. rest: what stays in float. dense: what
    the backend adds to the codes (not stored): dequantized weights of fake, nothing or its own layout of another.
    buffers: what the model computes for itself when it is built, such as positions (not stored).
    """

    codes: int
    scales: int
    zero_points: int
    transforms: int
    rest: int
    dense: int
    buffers: int = 0

    @property
    def stored(self) -> int:
        """All that is stored."""
        return self.codes + self.scales + self.zero_points + self.transforms + self.rest

    @property
    def resident(self) -> int:
        """What a process holds once the backend has prepared it."""
        return self.stored + self.dense + self.buffers


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, on whatever device."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def held_bytes(module: nn.Module) -> int:
    """Bytes of all tensors that a module's parts hold: parameters, buffers, and what a backend keeps in attributes;
    tensors that share memory count once, those made of others (of torchao, quanto) as what they are made of.
    """
    tensors = [*module.parameters(), *module.buffers()]
    for part in module.modules():
        tensors += [leaf for leaf in tree_leaves([*vars(part).values()]) if isinstance(leaf, Tensor)]
    plain = [inner for tensor in tensors for inner in _made_of(tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in plain}.values())


def _made_of(tensor: Any) -> list[Tensor]:
    """The tensors with memory of their own behind a wrapper."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [inner for name in tensor.__tensor_flatten__()[0] for inner in _made_of(getattr(tensor, name))]


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, and of what backends hold of its weights."""
    variants = [part for part in module.modules() if isinstance(part, Variant)]
    held = [tensor for variant in variants for tensor in variant.held_tensors()]
    return tensor_bytes([*module.parameters(), *module.buffers(), *held])


def laid_out(
    denoiser: nn.Module,
    plan: QuantPlan,
    timestep_scale: float | Mapping[str, Any] = 1000.0,
    backend: str = "fake",
) -> nn.Module:
    """`denoiser`, whose parameters are on meta, with the QuantLinears of `plan` swapped in (in place)."""
    build_quantized(denoiser, plan, backend, timestep_scale)
    return denoiser


def weight_bytes(quantized: nn.Module, backend: str | None = None) -> WeightBytes:
    """By kind, of a denoiser that `laid_out` gave or of a real one, as `backend` would hold it; None = each layer's."""
    counts = dict.fromkeys(("codes", "scales", "zero_points", "transforms", "rest"), 0)
    dense, given = 0, None if backend is None else get_backend(backend)
    variants: dict[str, Any] = {
        f"{name}.variants.{i}.": v for name, q in quant_linears(quantized).items() for i, v in enumerate(q.variants)
    }
    aliases = _aliases(quantized)
    once = {name: tensor for name, tensor in quantized.state_dict().items() if name not in aliases}
    for name, tensor in once.items():
        prefix, _, field = name.rpartition(".")
        inside = next((p for p in (f"{prefix}.", *_parents(prefix)) if p in variants), None)
        kind = "rest" if inside is None or field == "weight" else KINDS.get(field, "transforms")
        counts[kind] += tensor_bytes([tensor])
    for layer in quant_linears(quantized).values():
        each: Any = layer.variants
        for own, variant in zip(layer.backends, each, strict=True):
            if variant.qweight is not None:  # a weight in float is used as it is
                shape = (layer.out_features, layer.in_features)
                held = (given or own).weight_bytes(variant.scheme, *shape, layer.dtype)
                stored = (variant.qweight, variant.weight_scale, variant.weight_zero_point)
                dense += held - tensor_bytes(part for part in stored if part is not None)
    saved, within = set(quantized.state_dict()), tuple(f"{name}." for name in quant_linears(quantized))
    computed = (b for name, b in quantized.named_buffers() if name not in saved and not name.startswith(within))
    return WeightBytes(**counts, dense=dense, buffers=tensor_bytes(computed))


def _parents(prefix: str) -> list[str]:
    parts = prefix.split(".")
    return [".".join(parts[:i]) + "." for i in range(len(parts) - 1, 0, -1)]


def stored_entries(quantized: nn.Module, stored: Mapping[str, torch.dtype]) -> dict[str, Entry]:
    """Name -> dtype and shape in the artifact's files; stored: float parameters -> their types in the checkpoint.

    What variants of one Linear are bound to have in common is stored once. Transforms of different segments count as
    different: the file is smaller where they turn out equal (keys and values of captions, which know no noise level).
    """
    layers = quant_linears(quantized)
    common = {name for path, layer in layers.items() for name in _in_common(path, layer)} | _aliases(quantized)
    kept = dict(stored)
    for name, layer in layers.items():  # a weight kept as it was has another name there
        alone = [i for i, v in enumerate(layer.variants) if v.weight is not None and not v.chain]
        kept |= {f"{name}.variants.{i}.weight": kept[f"{name}.weight"] for i in alone if f"{name}.weight" in kept}

    def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
        return kept[name] if name in kept and kept[name].itemsize < dtype.itemsize else dtype

    state = quantized.state_dict()
    return {name: (stored_dtype(name, t.dtype), tuple(t.shape)) for name, t in state.items() if name not in common}


def _aliases(quantized: nn.Module) -> set[str]:
    """Second names of what stays in float; a QuantLinear that has two is stored under both."""
    everything = quantized.named_modules(remove_duplicate=False)
    prefixes = {prefix for prefix, module in everything if isinstance(module, QuantLinear)}
    return {name for name in tied_names(quantized) if name.rpartition(".")[0] not in prefixes}


def _in_common(path: str, layer: QuantLinear) -> list[str]:
    """Tensors of later variants whose weight is fitted as an earlier one's: all but ranges of static activations."""
    schemes: list[LayerScheme] = []
    found = []
    for i, variant in enumerate(layer.variants):
        scheme: Any = variant.scheme
        fitted: LayerScheme = replace(scheme, activation=None)  # the rest decides the weight
        varies = any(transform.differs_by_segment for transform in fitted.transforms)
        if not varies and fitted in schemes:
            found += [f"{path}.variants.{i}.{n}" for n in variant.state_dict() if not n.startswith("input_")]
        schemes.append(fitted)
    return found


def safetensors_bytes(entries: Mapping[str, Entry]) -> int:
    """Size of a safetensors file, its header included."""
    header, end = {}, 0
    for name, (dtype, shape) in sorted(
        entries.items(), key=lambda e: (-e[1][0].itemsize, FLOATS_LAST.get(e[1][0], 0), e[0])
    ):
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + text + -text % 8 + end


def stats_bytes(
    in_features: Mapping[str, int],
    num_buckets: int,
    rows_per_bucket: int,
    leaders: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Size of the file of calibration statistics of these Linears (name -> in_features), without second moments.

    leaders: Linear -> the first that reads the same inputs; none where it is not known, so that it is the most that
    the file can take. dtype: in which the model computes.
    """
    leaders = leaders or {name: name for name in in_features}
    entries: dict[str, Entry] = {}
    for layer in dict.fromkeys(leaders.values()):
        tensors = blank_state((), num_buckets, in_features[layer], rows_per_bucket, "meta", dtype)
        entries |= {f"{layer}/{field}": (t.dtype, tuple(t.shape)) for field, t in tensors.items()}
    entries |= {name: (t.dtype, tuple(t.shape)) for name, t in shared_tensor(leaders).items()}
    return safetensors_bytes(entries)


def artifact_bytes(
    quantized: nn.Module, plan: QuantPlan, stored: Mapping[str, torch.dtype], meta: Mapping[str, Any]
) -> int:
    """Size of all files of its artifact; stored: as of `stored_entries`."""
    entries = stored_entries(quantized, stored)
    state = quantized.state_dict()
    own = {
        "format_version": FORMAT_VERSION,
        "timestep_scale": 1000.0,
        "dtypes": {name: str(q.dtype).removeprefix("torch.") for name, q in quant_linears(quantized).items()},
        "widened": {name: "float32" for name, (dtype, _) in entries.items() if state[name].dtype != dtype},
        "equal": {name: name for name in state if name not in entries},
        "digests": dict.fromkeys(entries, "0" * 64),
        "sha256": dict.fromkeys((PLAN, META), "0" * 64),
    }
    text = json.dumps({**meta, **own}, indent=1) + "\n"
    return safetensors_bytes(entries) + len(plan.to_json().encode()) + len(text.encode())
