"""Bases of the descriptions that registries know by name and schemes are made of: transforms, ranges, roundings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from viditq.errors import UserError
from viditq.quant.description.fields import checked_fields
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.registry import RANGES, ROUNDINGS, TRANSFORMS, Registry


@dataclass(frozen=True)
class NamedSpec:
    """Base of the frozen descriptions that a closed registry knows by name."""

    registry: ClassVar[Registry]
    name: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **dataclasses.asdict(self)}

    @classmethod
    def parse(cls, value: Any) -> Any:
        """A description from itself, from a name (with its defaults) or from `to_dict`'s mapping, strictly."""
        kind = cls.registry.kind
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls.registry.get(value)()
        if not isinstance(value, Mapping) or "name" not in value:
            raise UserError(f"a {kind} must be a mapping with a 'name', got {value!r}")
        found = cls.registry.get(value["name"])
        rest = {key: field for key, field in value.items() if key != "name"}
        return found(**checked_fields(found, rest, f"{kind} {value['name']}"))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Any:
        """Strict inverse of `to_dict`; the name is looked up in the closed registry."""
        return cls.parse(fields)


@dataclass(frozen=True)
class TransformSpec(NamedSpec):
    """Base of the descriptions of transforms; subclasses live in viditq.quant.methods.transforms."""

    registry: ClassVar[Registry] = TRANSFORMS
    needs_stats: ClassVar[bool] = False
    rows_apart: ClassVar[bool] = False
    """Whether a row of the weight becomes the same, to the bit, whichever rows are transformed with it."""

    @property
    def differs_by_segment(self) -> bool:
        """Whether it is fitted for each segment on its own."""
        return False

    @property
    def is_open(self) -> bool:
        """Whether calibration has yet to say if it is fitted for each segment (`share_codes`)."""
        return False

    def for_segment(self, index: int, num_segments: int) -> TransformSpec:
        """This description with the values of one segment; raises UserError when their number differs."""
        return self

    def check(self, layer: str, in_features: int) -> None:
        """Raises UserError where a Linear of this name and width cannot be transformed."""

    def fit(self, weight_OC: Tensor, stats: Any, scheme: Any) -> Any:
        """The Transform for one weight; `stats` (SegmentStats) may be None unless `needs_stats`.

        scheme: the LayerScheme that this description is part of.
        """
        raise NotImplementedError

    def empty(self, in_features: int) -> Any:
        """A Transform of the right shapes whose tensors are loaded later, on the meta device."""
        raise NotImplementedError


@dataclass(frozen=True)
class RangeSpec(NamedSpec):
    """Base of the descriptions of how a grid is laid over values; subclasses live in viditq.quant.methods.ranges."""

    registry: ClassVar[Registry] = RANGES
    counts_extremes: ClassVar[bool] = False  # whether a static activation's grid is fitted to its extremes too
    rows_apart: ClassVar[bool] = False  # as of a transform

    def fit(self, values_GE: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """float32 scale and zero point [G, 1] of `bits` and `symmetric` of `spec` for each row of values."""
        raise NotImplementedError

    def rows_of(self, stats: Any) -> Tensor:
        """Of a segment's kept input rows, those that a static activation's grid is fitted to [n, C]."""
        rows: Tensor = stats.rows
        return rows


@dataclass(frozen=True)
class RoundingSpec(NamedSpec):
    """Base of the descriptions of how weights become codes; subclasses live in viditq.quant.methods.rounding."""

    registry: ClassVar[Registry] = ROUNDINGS
    needs_moments: ClassVar[bool] = False
    rows_apart: ClassVar[bool] = False  # as of a transform
    learns_blocks: ClassVar[bool] = False
    """Whether all Linears of a block are rounded together (viditq.quant.reconstruction); those outside blocks alone."""

    def quantize(self, weight_OC: Tensor, spec: QuantSpec, grid: tuple[Tensor, Tensor], moments_CC: Any) -> Any:
        """The QuantizedWeight of a weight that has been through its chain.

        moments_CC: X^T X of the chain's outputs X up to a factor, float; None unless `LayerScheme.moments_for`.
        """
        raise NotImplementedError


def nearest_rounding() -> RoundingSpec:
    """The default."""
    return RoundingSpec.parse("nearest")


def min_max_range() -> RangeSpec:
    """The default."""
    return RangeSpec.parse("min_max")
