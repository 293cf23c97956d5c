"""QuantSpec: the format of one tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from viditq.errors import UserError
from viditq.quant.description.fields import checked_fields, is_int

WEIGHT_GRANULARITIES = ("tensor", "channel", "group")
ACTIVATION_GRANULARITIES = ("tensor", "channel", "token", "group")


@dataclass(frozen=True)
class QuantSpec:
    """Format of one tensor: bit-width, grid and which elements share a scale.

    bits: 2 to 8. granularity: tensor | channel | token | group. For a weight, channel is an output channel;
    for an activation, an input channel. dynamic (activations only): scales come from the very tensor being
    quantized. full_range (dynamic symmetric activations only): scale = amax / (2^b - 1) * 2, as torchao has it, in
    place of amax / (2^(b-1) - 1): the largest value is between two codes, and the smallest code is used too.
    """

    bits: int
    symmetric: bool = False
    granularity: str = "tensor"
    group_size: int | None = None
    dynamic: bool = False
    full_range: bool = False

    def __post_init__(self) -> None:
        if not is_int(self.bits) or not 2 <= self.bits <= 8:
            raise UserError(
                f"bits={self.bits!r} is not possible: give a whole number from 2 to 8 (null = leave in float)"
            )
        for field in ("symmetric", "dynamic", "full_range"):
            if not isinstance(getattr(self, field), bool):
                raise UserError(f"{field}={getattr(self, field)!r} must be true or false")
        if self.granularity not in ACTIVATION_GRANULARITIES:
            allowed = ", ".join(ACTIVATION_GRANULARITIES)
            raise UserError(f"granularity={self.granularity!r} is unknown; choose one of {allowed}")
        if self.full_range and not (self.symmetric and self.dynamic):
            raise UserError("full_range only goes with symmetric=true and dynamic=true: leave it out otherwise")
        self._check_group_size()

    def _check_group_size(self) -> None:
        size = self.group_size
        if self.granularity == "group" and (size is None or not is_int(size) or size < 1):
            raise UserError(f"granularity=group needs group_size, a positive whole number such as 64; got {size!r}")
        if self.granularity != "group" and size is not None:
            raise UserError(f"group_size={size!r} only goes with granularity=group, not {self.granularity}")

    def check_weight(self) -> QuantSpec:
        """Raises UserError unless this can describe a weight."""
        if self.granularity not in WEIGHT_GRANULARITIES:
            allowed = ", ".join(WEIGHT_GRANULARITIES)
            raise UserError(f"a weight cannot have granularity={self.granularity}; choose one of {allowed}")
        if self.dynamic:
            raise UserError("a weight cannot be dynamic: it is quantized once; remove dynamic=true")
        return self

    def check_activation(self) -> QuantSpec:
        """Raises UserError unless this can describe an activation."""
        if self.granularity == "token" and not self.dynamic:
            raise UserError(
                "a static activation cannot have granularity=token: tokens differ between samples; "
                "set dynamic=true, or granularity=tensor"
            )
        if self.granularity == "channel" and self.dynamic:
            raise UserError(
                "a dynamic activation cannot have granularity=channel: its scales would mix tokens; "
                "set dynamic=false, or granularity=token"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        if not self.full_range:  # younger than plans and fingerprints on disk
            del values["full_range"]
        return values

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> QuantSpec:
        """Strict inverse of `to_dict`."""
        kwargs = checked_fields(cls, fields, "QuantSpec")
        if "bits" not in kwargs:
            raise UserError("QuantSpec needs the field 'bits', a whole number from 2 to 8")
        return cls(**kwargs)
