"""One file a denoiser in ComfyUI's formats, under the names of the model's original release.

Codes and scales are those of the artifact (comfy_formats.py); what a release joins by rows (q, k, v) is joined. Both
ways of saying how a layer is quantized are written: a tensor `comfy_quant` beside it, the header's entry for all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.export.comfy_formats import Entry, Marker, Rows, common_marker, entries, markers, nearest, refusal
from viditq.export.refusal import Refusal, raise_refused, refusals
from viditq.export.release_extras import extra_tensors
from viditq.export.release_names import Origin
from viditq.export.releases import release_of
from viditq.files import atomic, stored_metadata
from viditq.mapped import Writer, header_bound
from viditq.models.adapter import ModelAdapter
from viditq.quant.artifact import PLAN, StoredTensors, read_meta
from viditq.quant.convert import shapes_of
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.methods.quantizer import QuantizedWeight
from viditq.quant.numerics.packing import unpack

LAYERS, MARKER, MADE_BY = "_quantization_metadata", "comfy_quant", "viditq"
BY_NOISE_LEVEL = "the same recipe with segments=[0, 1] and dynamic activations (quant=w8a8_sym)"


def export(artifact: Path, out: Path, requantize: bool = False) -> None:
    """Write `out`, or where a pipeline has several denoisers one file each, with their names before the ending.

    Raises UserError for an artifact that is damaged, a model whose release's names are not known, what the formats
    cannot hold (unless it is to be quantized again), and for files that are there already and hold something else.
    """
    meta = read_meta(artifact)
    plan = QuantPlan.from_json((artifact / PLAN).read_text())
    if meta.get("correction"):
        raise UserError(
            f"--to comfyui cannot hold quant.correction={meta['correction']}, which changes the denoiser's output. The "
            "nearest that it can hold is quant.correction=null: quantize without."
        )
    found = refusals(plan, refusal, BY_NOISE_LEVEL)
    raise_refused("comfyui", found, True)
    adapter = ModelAdapter.from_dict(meta["model"])
    denoiser = adapter.build_denoiser()
    tensors = StoredTensors(artifact, meta)
    parts = dict(denoiser) if isinstance(denoiser, nn.ModuleDict) else {"": denoiser}
    files = [
        (_file(out, name), _Denoiser(name, part, plan, tensors, extra_tensors(adapter, part)))
        for name, part in parts.items()
    ]
    key = {"artifact": meta["sha256"], "model": adapter.path}
    for path, written in files:
        if not _is_there(path, key):
            written.write(path, key)


def _file(out: Path, denoiser: str) -> Path:
    return out.with_name(f"{out.stem}.{denoiser}{out.suffix}") if denoiser else out


def _is_there(path: Path, key: Mapping[str, Any]) -> bool:
    """Whether this very export is there; UserError where something else is."""
    if not path.exists():
        return False
    if stored_metadata(path).get(MADE_BY) == json.dumps(key):
        return True
    raise UserError(f"{path} is there already and is no export of this artifact. Delete it, or give another --out.")


class _Denoiser:
    """One denoiser as it is written. name: what begins its layers' names in the plan, empty where it is alone."""

    def __init__(
        self, name: str, denoiser: nn.Module, plan: QuantPlan, tensors: StoredTensors, extra: Mapping[str, Tensor]
    ) -> None:
        self.prefix, self.tensors, self.extra = f"{name}." if name else "", tensors, extra
        self.state = {n.removeprefix(self.prefix): t for n, t in tensors.state().items() if n.startswith(self.prefix)}
        self.shapes = shapes_of(denoiser)
        self.schemes: dict[str, LayerScheme] = {}
        for layer, names in plan.layers.items():
            if layer.startswith(self.prefix) and names[0] is not None:
                self.schemes[layer.removeprefix(self.prefix)] = plan.schemes[names[0]]
        wanted = [n for n in self.state if ".variants." not in n] + [f"{layer}.weight" for layer in self.schemes]
        self.origins = release_of(type(denoiser).__name__).origins(wanted)
        self.layers = {
            target.removesuffix(".weight"): self._marker(origin)
            for target, origin in self.origins.items()
            if any(name.removesuffix(".weight") in self.schemes for name in origin.names)
        }

    def _marker(self, origin: Origin) -> Marker:
        """The format of a Linear; raises UserError where its parts have none in common."""
        parts = [name.removesuffix(".weight") for name in origin.names]
        offered = [markers(self.schemes[p], self.shapes[p][1]) if p in self.schemes else [] for p in parts]
        marker = common_marker(offered)
        if marker is None:
            other = next((p for p in parts if p not in self.schemes), parts[-1])
            scheme = self.schemes.get(other)
            why = f"but lies in one tensor with {parts[0]}, whose scheme is another"
            first = Refusal(
                f"{self.prefix}{other}", "scheme", scheme and "another", why, nearest(next(iter(self.schemes.values())))
            )
            raise_refused("comfyui", {other: first}, True)
        assert marker is not None
        return marker

    def write(self, path: Path, key: Mapping[str, Any]) -> None:
        """The file, whole or not at all; one Linear is in memory at a time."""
        wanted = [entry for target, origin in self.origins.items() for entry in self._entries(target, origin)]
        wanted += [Entry(name, t.dtype, tuple(t.shape), partial(_same, t)) for name, t in self.extra.items()]
        wanted += [_marker_entry(layer, marker) for layer, marker in self.layers.items()]
        told = {"format_version": "1.0", "layers": self.layers}
        metadata = {"format": "pt", LAYERS: json.dumps(told), MADE_BY: json.dumps(dict(key))}
        room = header_bound({e.name: e.shape for e in wanted}, sum(_nbytes(e) for e in wanted))
        with atomic(path) as temporary, Writer(temporary, room + len(json.dumps(metadata)) + 32) as file:
            file.metadata.update(metadata)
            # the widest type first, so that what follows begins at a multiple of its element's size
            for entry in sorted(wanted, key=lambda e: (-e.dtype.itemsize, e.name)):
                tensor = entry.make()
                assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), entry.name
                file.add(entry.name, tensor)

    def _entries(self, target: str, origin: Origin) -> list[Entry]:
        layer = target.removesuffix(".weight")
        if target.endswith(".weight") and layer in self.layers:
            parts = [self._rows(name.removesuffix(".weight")) for name in origin.names]
            in_features = self.shapes[origin.names[0].removesuffix(".weight")][1]
            return entries(layer, self.layers[layer], parts, in_features, origin.swapped)
        first = self.state[origin.names[0]]
        rows = sum(len(self.state[name]) for name in origin.names) if first.ndim else 0
        shape = (rows, *first.shape[1:]) if first.ndim else ()
        dtype = torch.promote_types(first.dtype, self.state[origin.names[-1]].dtype)
        return [Entry(target, dtype, shape, partial(self._float, origin, dtype))]

    def _float(self, origin: Origin, dtype: torch.dtype) -> Tensor:
        self.tensors.check(f"{self.prefix}{name}" for name in origin.names)
        parts = [self.state[name].to(dtype) for name in origin.names]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        return torch.cat(rows.chunk(2)[::-1]) if origin.swapped else rows

    def _rows(self, layer: str) -> Rows:
        spec = self.schemes[layer].weight
        assert spec is not None

        def read() -> QuantizedWeight:
            fields = [f"{layer}.variants.0.{field}" for field in ("qweight", "weight_scale", "weight_zero_point")]
            self.tensors.check(f"{self.prefix}{name}" for name in fields if name in self.state)
            codes = unpack(self.state[fields[0]], spec.bits, self.shapes[layer][1])
            return QuantizedWeight(codes, self.state[fields[1]], self.state.get(fields[2]))

        return Rows(spec, self.shapes[layer][0], read)


def _marker_entry(layer: str, marker: Marker) -> Entry:
    content = torch.frombuffer(bytearray(json.dumps(marker).encode()), dtype=torch.uint8)
    return Entry(f"{layer}.{MARKER}", torch.uint8, tuple(content.shape), partial(_same, content))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _nbytes(entry: Entry) -> int:
    return int(torch.Size(entry.shape).numel()) * entry.dtype.itemsize
