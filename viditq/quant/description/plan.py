"""QuantPlan: which scheme each Linear uses at each noise level; layers that are not listed stay float."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from viditq.errors import UserError, close_names
from viditq.quant.description.blocks import by_block
from viditq.quant.description.fields import checked_fields
from viditq.quant.description.scheme import FLOAT_BITS, LayerScheme

SharesLike = Sequence[float] | Mapping[str, Sequence[float]]
"""Share of the sampling steps in each segment, of all layers alike or by layer."""


def check_edges(edges: Any, what: str = "segments") -> tuple[float, ...]:
    """Noise levels from 0 to 1 in ascending order, e.g. (0, 0.5, 1); raises UserError otherwise."""
    hint = "they must tile [0, 1]: ascending noise levels that start at 0 and end at 1, such as [0, 0.5, 1]"
    if isinstance(edges, str) or not isinstance(edges, Sequence):
        raise UserError(f"{what}={edges!r}: {hint}")
    if not all(isinstance(e, int | float) and not isinstance(e, bool) for e in edges):
        raise UserError(f"{what}={list(edges)}: {hint}")
    ascending = all(a < b for a, b in pairwise(edges))
    if len(edges) < 2 or edges[0] != 0 or edges[-1] != 1 or not ascending:
        raise UserError(f"{what}={list(edges)}: {hint}")
    return tuple(float(e) for e in edges)


def _weight_bits(scheme: LayerScheme) -> int:
    return scheme.weight.bits if scheme.weight else FLOAT_BITS


def _activation_bits(scheme: LayerScheme) -> int:
    return scheme.activation.bits if scheme.activation else FLOAT_BITS


@dataclass(frozen=True)
class QuantPlan:
    """edges: noise levels 0 .. 1 of n segments. schemes: by name. layers: n names each, None = float."""

    edges: tuple[float, ...]
    schemes: dict[str, LayerScheme]
    layers: dict[str, tuple[str | None, ...]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "edges", check_edges(self.edges, "edges"))
        object.__setattr__(self, "layers", {layer: tuple(names) for layer, names in self.layers.items()})
        for layer, names in self.layers.items():
            if len(names) != self.num_segments:
                raise UserError(
                    f"layer {layer} names {len(names)} schemes for {self.num_segments} segments; give one per segment"
                )
            for name in names:
                if name is not None and name not in self.schemes:
                    raise UserError(
                        f"layer {layer} names the unknown scheme {name!r}; {close_names(name, self.schemes)}"
                    )

    @property
    def num_segments(self) -> int:
        return len(self.edges) - 1

    def scheme(self, layer: str, segment: int) -> LayerScheme | None:
        """The scheme of `layer` in `segment`; None = float."""
        name = self.layers[layer][segment] if layer in self.layers else None
        return None if name is None else self.schemes[name]

    @property
    def needs_stats(self) -> bool:
        """Whether any layer needs calibration statistics."""
        used = {name for names in self.layers.values() for name in names if name is not None}
        return any(self.schemes[name].needs_stats for name in used)

    @property
    def bits_vary(self) -> bool:
        """Whether any layer has other bits in one segment than in another: averages then depend on `shares`."""
        for names in self.layers.values():
            schemes = [LayerScheme(None, None) if name is None else self.schemes[name] for name in names]
            if len({(_weight_bits(scheme), _activation_bits(scheme)) for scheme in schemes}) > 1:
                return True
        return False

    @property
    def moment_layers(self) -> list[str]:
        """Layers whose rounding needs second moments of their inputs."""
        return self._layers_where(lambda layer, scheme: scheme.moments_for(layer))

    @property
    def learned_blocks(self) -> dict[str, list[str]]:
        """Block -> its layers whose roundings are learned together, on kept inputs of the block."""
        return by_block(self._layers_where(lambda layer, scheme: scheme.learned_in_block(layer)))

    @property
    def open_layers(self) -> list[str]:
        """Layers of which calibration has yet to say whether they get codes for each segment (`share_codes`)."""
        return self._layers_where(lambda _, scheme: any(t.is_open for t in scheme.transforms))

    def _layers_where(self, condition: Callable[[str, LayerScheme], bool]) -> list[str]:
        """Layers of which any scheme meets `condition`."""
        used = {layer: [self.schemes[name] for name in {*names} if name] for layer, names in self.layers.items()}
        return [layer for layer, schemes in used.items() if any(condition(layer, scheme) for scheme in schemes)]

    def average_weight_bits(
        self,
        weights_numel: Mapping[str, int],
        in_features: Mapping[str, int] | None = None,
        shares: SharesLike | None = None,
    ) -> float:
        """Mean bits of a weight over all Linears in `weights_numel` (layer -> number of weights).

        A Linear or a segment left in float counts 16 bits. shares: of the sampling steps that fall into each segment,
        of all layers alike or by layer (`step_shares`); None = by width in noise level. A low-rank
        branch counts its r (O + C) numbers at 16 bits each, for which `in_features` (layer -> C) is needed. Scales and
        zero points are not counted (`artifact.size_bytes` has them).
        """

        def bits_of(layer: str, scheme: LayerScheme) -> float:
            bits = _weight_bits(scheme)
            if scheme.low_rank is None:
                return bits
            if in_features is None:
                raise UserError(f"layer {layer} has a low-rank branch: its bits need in_features as well")
            count, inputs = weights_numel[layer], in_features[layer]
            return bits + FLOAT_BITS * scheme.low_rank * (count // inputs + inputs) / count

        return self._average(weights_numel, bits_of, shares)

    def average_activation_bits(self, inputs_numel: Mapping[str, int], shares: SharesLike | None = None) -> float:
        """The same for the inputs of the Linears (layer -> in_features, or elements of its input).

        The input of a low-rank branch, the same values in 16 bits, is not counted: it is nothing that is stored.
        """
        return self._average(inputs_numel, lambda _, scheme: _activation_bits(scheme), shares)

    def _average(
        self,
        numel: Mapping[str, int],
        bits_of: Callable[[str, LayerScheme], float],
        shares: SharesLike | None,
    ) -> float:
        widths = [high - low for low, high in pairwise(self.edges)]
        missing = [layer for layer in self.layers if layer not in numel]
        if missing:
            raise UserError(f"the plan quantizes {missing[0]}, which the model lacks; {close_names(missing[0], numel)}")
        total = 0.0
        for layer, count in numel.items():
            of_layer = shares.get(layer, widths) if isinstance(shares, Mapping) else shares or widths
            for segment, share in enumerate(of_layer):
                scheme = self.scheme(layer, segment)
                total += count * share * (FLOAT_BITS if scheme is None else bits_of(layer, scheme))
        return total / sum(numel.values())

    def to_json(self) -> str:
        """Stable text: the same plan gives the same bytes."""
        schemes = {name: scheme.to_dict() for name, scheme in self.schemes.items()}
        layers = {layer: list(names) for layer, names in self.layers.items()}
        return json.dumps({"edges": list(self.edges), "schemes": schemes, "layers": layers}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> QuantPlan:
        """Strict inverse of `to_json`; raises UserError for anything malformed."""
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"the plan is not valid JSON: {error}") from None
        kwargs = checked_fields(cls, fields, "the plan")
        for field in ("edges", "schemes", "layers"):
            if field not in kwargs:
                raise UserError(f"the plan lacks the field {field!r}")
        for field in ("schemes", "layers"):
            if not isinstance(kwargs[field], dict):
                raise UserError(f"the plan's field {field!r} must be a mapping, got {kwargs[field]!r}")
        for layer, names in kwargs["layers"].items():
            if not isinstance(names, list) or not all(name is None or isinstance(name, str) for name in names):
                raise UserError(f"layer {layer} of the plan must list one scheme per segment, got {names!r}")
        schemes = {name: LayerScheme.from_dict(scheme) for name, scheme in kwargs["schemes"].items()}
        return cls(kwargs["edges"], schemes, kwargs["layers"])
