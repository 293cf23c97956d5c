"""A denoiser's file in ComfyUI's formats: what a release joins by rows (q, k, v) is joined.

Both ways of saying how a layer is quantized are written: a tensor `comfy_quant` beside it, the header's entry for all.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from viditq.export.comfy_formats import Marker, Rows, common_marker, entries, markers, nearest
from viditq.export.float_weights import FloatWeights
from viditq.export.part import Entry
from viditq.export.part_files import nbytes
from viditq.export.refusal import Refusal, raise_refused
from viditq.export.release_extras import extra_tensors
from viditq.export.release_names import Origin
from viditq.export.releases import release_of
from viditq.export.requantize import quantized_again, scheme_again
from viditq.files import atomic
from viditq.mapped import Writer, header_bound, release
from viditq.models.adapter import ModelAdapter
from viditq.quant.artifact import StoredTensors
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.execution.model_linears import shapes_of
from viditq.quant.methods.quantizer import QuantizedWeight
from viditq.quant.numerics.packing import unpack

LAYERS, MARKER, MADE_BY, COST = "_quantization_metadata", "comfy_quant", "viditq", "viditq_requantized"


class ComfyFile:
    """One denoiser as it is written.

    name: what begins its layers' names in the plan, empty where it is alone. refused: layers that no format holds.
    weights: where what is refused is quantized again; None = UserError. again: those layers, and how.
    """

    def __init__(
        self,
        name: str,
        denoiser: nn.Module,
        adapter: ModelAdapter,
        plan: QuantPlan,
        tensors: StoredTensors,
        refused: Collection[str],
        weights: FloatWeights | None,
    ) -> None:
        self.prefix, self.tensors, self.weights = f"{name}." if name else "", tensors, weights
        self.state = {n.removeprefix(self.prefix): t for n, t in tensors.state().items() if n.startswith(self.prefix)}
        self.shapes, self.extra = shapes_of(denoiser), extra_tensors(adapter, denoiser)
        self.schemes: dict[str, LayerScheme] = {}
        self.stored_as: dict[str, str] = {}
        self.looked_at: list[Tensor] = []
        for layer, names in plan.layers.items():
            if not layer.startswith(self.prefix):
                continue
            own, used = layer.removeprefix(self.prefix), next(filter(None, names), None)
            if used is not None:
                self.schemes[own] = plan.schemes[used]
            else:  # a plan may name what it leaves in float
                self.stored_as[f"{own}.weight"] = f"{own}.variants.0.weight"
                self.state[f"{own}.weight"] = self.state.pop(f"{own}.variants.0.weight")
        self.refused = {layer.removeprefix(self.prefix) for layer in refused}
        self.again: dict[str, LayerScheme] = {}
        floats = [name for name in self.state if ".variants." not in name]
        self.origins = release_of(type(denoiser).__name__).origins([*floats, *(f"{s}.weight" for s in self.schemes)])
        self.layers = {
            target.removesuffix(".weight"): self._marker(_layers_of(origin))
            for target, origin in self.origins.items()
            if any(layer in self.schemes for layer in _layers_of(origin))
        }

    def _marker(self, parts: Sequence[str]) -> Marker:
        """The format of the Linears of one tensor; raises UserError where they have none in common."""
        held = [p for p in parts if p in self.schemes and p not in self.refused]
        offered = [markers(self.schemes[p], self.shapes[p][1]) if p in held else [] for p in parts]
        marker = common_marker(offered)
        if marker is not None:
            return marker
        if self.weights is None:
            raise_refused("comfyui", {parts[0]: self._unlike(parts)}, True)
        in_features = self.shapes[parts[0]][1]
        scheme = scheme_again([self.schemes[p] for p in parts if p in self.schemes], in_features)
        self.again |= {f"{self.prefix}{part}": scheme for part in parts}
        return markers(scheme, in_features)[0]

    def _unlike(self, parts: Sequence[str]) -> Refusal:
        """Of parts that have no format in common, or of one for whose width there is none."""
        if len(parts) == 1:
            width, layer = self.shapes[parts[0]][1], f"{self.prefix}{parts[0]}"
            why = "which divide into no groups that the formats have"
            return Refusal(layer, "in_features", width, why, nearest(self.schemes[parts[0]]))
        other = next((p for p in parts if p not in self.schemes), parts[-1])
        first = next(p for p in parts if p in self.schemes)
        why = f"but lies in one tensor with {self.prefix}{first}, which is quantized in another way"
        kind = "another" if other in self.schemes else "float"
        return Refusal(f"{self.prefix}{other}", "scheme", kind, why, nearest(self.schemes[first]))

    def write(self, path: Path, key: Mapping[str, Any], cost: Mapping[str, Any]) -> None:
        """The file, whole or not at all; one Linear is in memory at a time. key, cost: for its header."""
        wanted = [entry for target, origin in self.origins.items() for entry in self._entries(target, origin)]
        wanted += [Entry(name, t.dtype, tuple(t.shape), partial(_same, t)) for name, t in self.extra.items()]
        wanted += [_marker_entry(layer, marker) for layer, marker in self.layers.items()]
        told = {"format_version": "1.0", "layers": self.layers}
        metadata = {"format": "pt", LAYERS: json.dumps(told), MADE_BY: json.dumps(dict(key))}
        metadata |= {COST: json.dumps(dict(cost))} if cost else {}
        room = header_bound({e.name: e.shape for e in wanted}, sum(map(nbytes, wanted)))
        with atomic(path) as temporary, Writer(temporary, room + len(json.dumps(metadata)) + 32) as file:
            file.metadata.update(metadata)
            # the widest type first, so that what follows begins at a multiple of its element's size
            for entry in sorted(wanted, key=lambda e: (-e.dtype.itemsize, e.name)):
                tensor = entry.make()
                assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), entry.name
                file.add(entry.name, tensor)
                release(self.looked_at)
                self.looked_at = []

    def _entries(self, target: str, origin: Origin) -> list[Entry]:
        layer = target.removesuffix(".weight")
        if target.endswith(".weight") and layer in self.layers:
            parts = _layers_of(origin)
            rows = [self._rows(part) for part in parts]
            return entries(layer, self.layers[layer], rows, self.shapes[parts[0]][1], origin.swapped)
        first = self.state[origin.names[0]]
        shape = (sum(len(self.state[name]) for name in origin.names), *first.shape[1:]) if first.ndim else ()
        dtype = first.dtype
        for name in origin.names:
            dtype = torch.promote_types(dtype, self.state[name].dtype)
        return [Entry(target, dtype, shape, partial(self._float, origin, dtype))]

    def _float(self, origin: Origin, dtype: torch.dtype) -> Tensor:
        found = [self.tensors.of(f"{self.prefix}{self.stored_as.get(name, name)}") for name in origin.names]
        self.looked_at += found
        parts = [tensor.to(dtype) for tensor in found]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        return torch.cat(rows.chunk(2)[::-1]) if origin.swapped else rows

    def _rows(self, layer: str) -> Rows:
        again, out_features = self.again.get(f"{self.prefix}{layer}"), self.shapes[layer][0]
        if again is not None and again.weight is not None and self.weights is not None:
            read = partial(quantized_again, self.weights, f"{self.prefix}{layer}", again)
            return Rows(again.weight, out_features, read)
        spec = self.schemes[layer].weight
        assert spec is not None
        return Rows(spec, out_features, partial(self._stored, layer, spec.bits))

    def _stored(self, layer: str, bits: int) -> QuantizedWeight:
        fields = [f"{layer}.variants.0.{field}" for field in ("qweight", "weight_scale", "weight_zero_point")]
        found = [self.tensors.of(f"{self.prefix}{name}") if name in self.state else None for name in fields]
        self.looked_at += [tensor for tensor in found if tensor is not None]
        qweight, scale, zero_point = found
        assert qweight is not None and scale is not None
        return QuantizedWeight(unpack(qweight, bits, self.shapes[layer][1]), scale, zero_point)


def _layers_of(origin: Origin) -> list[str]:
    return [name.removesuffix(".weight") for name in origin.names if name.endswith(".weight")]


def _marker_entry(layer: str, marker: Marker) -> Entry:
    content = torch.frombuffer(bytearray(json.dumps(marker).encode()), dtype=torch.uint8)
    return Entry(f"{layer}.{MARKER}", torch.uint8, tuple(content.shape), partial(_same, content))


def _same(tensor: Tensor) -> Tensor:
    return tensor
