"""One denoiser of an artifact as exporters read it: a tensor at a time, under its name within the denoiser.

Legend: O out_features, C in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import Tensor

from viditq.export.float_weights import FloatWeights
from viditq.export.folding import opened
from viditq.export.requantize import quantized_again
from viditq.mapped import release
from viditq.models.registry import find_class
from viditq.quant.artifact import read_meta
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.execution.model_linears import shapes_of
from viditq.quant.methods.quantizer import QuantizedWeight
from viditq.quant.numerics.packing import unpack


class Entry(NamedTuple):
    """A tensor that is made when it is written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class Again:
    """Layers that are quantized again, by their names in the plan; weights: from which."""

    schemes: Mapping[str, LayerScheme]
    weights: FloatWeights


class Part:
    """floats: the tensors that are not quantized. schemes: of the Linears that are; shapes: [O, C] of all of them.

    segment: whose schemes hold; the others are left out. again: what is not read but made.
    """

    def __init__(
        self, artifact: Path, prefix: str, config: Mapping[str, Any], segment: int = 0, again: Again | None = None
    ) -> None:
        """prefix: what begins its names in the artifact. config: config.json of the float denoiser."""
        with init_empty_weights(include_buffers=False):
            denoiser = find_class(config["_class_name"]).from_config(config)
        self.shapes = shapes_of(denoiser)
        self.tensors = opened(artifact, read_meta(artifact), denoiser, prefix, again.schemes if again else ())
        self.plan = self.tensors.plan
        self._prefix, self._segment, self._again = prefix, segment, again
        self._state = {n.removeprefix(prefix): t for n, t in self.tensors.state().items() if n.startswith(prefix)}
        self.schemes: dict[str, LayerScheme] = {}
        self._stored_as = {name: name for name in self._state if ".variants." not in name}
        for layer in (full.removeprefix(prefix) for full in self.plan.layers if full.startswith(prefix)):
            scheme = self.plan.scheme(f"{prefix}{layer}", segment)
            if again is not None and f"{prefix}{layer}" in again.schemes:
                scheme = again.schemes[f"{prefix}{layer}"]
            if scheme is None:  # a plan may name what it leaves in float
                self._stored_as[f"{layer}.weight"] = f"{self._variant(layer)}.weight"
            else:
                self.schemes[layer] = scheme
        self.floats = {name: self._state[stored] for name, stored in self._stored_as.items()}

    def entries(self) -> list[Entry]:
        """Those of `floats`."""
        return [Entry(n, t.dtype, tuple(t.shape), partial(self._float, n)) for n, t in self.floats.items()]

    def _float(self, name: str) -> Tensor:
        return self.tensors.of(f"{self._prefix}{self._stored_as[name]}")

    def quantized(self, layer: str) -> QuantizedWeight:
        """Codes and grid; raises UserError for a tensor that is not as it was written."""
        if self._again is not None and f"{self._prefix}{layer}" in self._again.schemes:
            return quantized_again(self._again.weights, f"{self._prefix}{layer}", self.schemes[layer])
        spec = self.schemes[layer].weight
        assert spec is not None
        codes = self.tensor(layer, "qweight")
        made = QuantizedWeight(unpack(codes, spec.bits, self.shapes[layer][1]), *self.grid(layer))
        if spec.bits < 8:
            release([codes])
        return made

    def grid(self, layer: str) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point alone."""
        if self._again is not None and f"{self._prefix}{layer}" in self._again.schemes:
            quantized = self.quantized(layer)
            return quantized.scale, quantized.zero_point
        return self.tensor(layer, "weight_scale"), self.find(layer, "weight_zero_point")

    def tensor(self, layer: str, field: str) -> Tensor:
        """A stored tensor of a layer's variant, such as weight_scale."""
        found = self.find(layer, field)
        assert found is not None, f"{layer} has no {field}"
        return found

    def find(self, layer: str, field: str) -> Tensor | None:
        """The same, None where there is none."""
        name = f"{self._variant(layer)}.{field}"
        return self.tensors.of(f"{self._prefix}{name}") if name in self._state else None

    def _variant(self, layer: str) -> str:
        return f"{layer}.variants.{variant_of(self.plan, f'{self._prefix}{layer}', self._segment)}"


def variant_of(plan: QuantPlan, layer: str, segment: int) -> int:
    """Which of a layer's variants a segment uses: segments whose tensors cannot differ share one."""
    keys: Sequence[tuple[str | None, int | None]] = [
        (name, i if name is not None and plan.schemes[name].per_segment else None)
        for i, name in enumerate(plan.layers[layer])
    ]
    return list(dict.fromkeys(keys)).index(keys[segment])


def signed_codes(quantized: QuantizedWeight, bits: int) -> Tensor:
    """int8 [O, C], counted from the middle."""
    return (quantized.codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def row_scale(scale: Tensor, rows: int) -> Tensor:
    """float32 [O, 1] of a scale a row, or of one for all."""
    return scale.float().reshape(-1, 1).expand(rows, 1)
