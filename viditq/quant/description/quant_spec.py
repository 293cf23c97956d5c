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
YOUNGER = {"full_range": False, "number": "int", "block_scale": None}
NUMBER_BITS = {"e4m3": 8, "e5m2": 8, "e2m1": 4}
BLOCK_SCALES = ("e8m0", "e4m3")  # a byte each
LABELS = {("e4m3", "e8m0", 32): "mxfp8", ("e2m1", "e8m0", 32): "mxfp4", ("e2m1", "e4m3", 16): "nvfp4"}


@dataclass(frozen=True)
class QuantSpec:
    """Format of one tensor: bit-width, grid and which elements share a scale.

    bits: 2 to 8. granularity: tensor | channel | token | group. For a weight, channel is an output channel;
    for an activation, an input channel. dynamic (activations only): scales come from the very tensor being
    quantized. full_range (dynamic symmetric activations only): scale = amax / (2^b - 1) * 2, as torchao has it, in
    place of amax / (2^(b-1) - 1): the largest value is between two codes, and the smallest code is used too. number:
    int, or a floating-point number of `bits` bits by its exponent and mantissa: e4m3, e5m2 (8), e2m1 (4); such grids
    are symmetric. block_scale (groups of floating-point numbers only): the scales are numbers themselves, e8m0 = powers
    of two, e4m3 = under one float32 scale of the whole tensor; None = float32.
    """

    bits: int
    symmetric: bool = False
    granularity: str = "tensor"
    group_size: int | None = None
    dynamic: bool = False
    full_range: bool = False
    number: str = "int"
    block_scale: str | None = None

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
        self._check_number()

    def _check_group_size(self) -> None:
        size = self.group_size
        if self.granularity == "group" and (size is None or not is_int(size) or size < 1):
            raise UserError(f"granularity=group needs group_size, a positive whole number such as 64; got {size!r}")
        if self.granularity != "group" and size is not None:
            raise UserError(f"group_size={size!r} only goes with granularity=group, not {self.granularity}")

    def _check_number(self) -> None:
        if self.number != "int" and self.number not in NUMBER_BITS:
            raise UserError(f"number={self.number!r} is unknown; choose int or one of {', '.join(NUMBER_BITS)}")
        if self.is_float and self.bits != NUMBER_BITS[self.number]:
            raise UserError(f"number={self.number} has {NUMBER_BITS[self.number]} bits, not bits={self.bits}")
        if self.is_float and self.full_range:
            raise UserError(f"number={self.number} has no codes to count; leave out full_range")
        if self.is_float and not self.symmetric:
            raise UserError(f"number={self.number} has a sign and no zero point; set symmetric=true")
        if self.block_scale is None:
            return
        if self.block_scale not in BLOCK_SCALES:
            allowed = ", ".join(BLOCK_SCALES)
            raise UserError(
                f"block_scale={self.block_scale!r} is unknown; choose one of {allowed}, or null for float32"
            )
        if not self.is_float or self.granularity != "group":
            raise UserError(
                f"block_scale={self.block_scale} goes with number={'|'.join(NUMBER_BITS)} and granularity=group, got "
                f"number={self.number}, granularity={self.granularity}"
            )

    @property
    def is_float(self) -> bool:
        """Whether codes are floating-point numbers."""
        return self.number != "int"

    @property
    def label(self) -> str:
        """For names and tables: 8, 4, ... of integers; mxfp8, mxfp4, nvfp4 as they are known; else such as e4m3."""
        if not self.is_float:
            return str(self.bits)
        return LABELS.get((self.number, self.block_scale or "", self.group_size or 0), self.number)

    @property
    def bytes_per_scale(self) -> int:
        """Of a stored scale with its zero point."""
        if self.block_scale is not None:
            return 1
        return 4 if self.symmetric else 5

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
        if self.block_scale is not None and not self.dynamic:
            raise UserError(
                f"a static activation cannot have block_scale={self.block_scale}: its blocks' scales are found at run "
                "time; set dynamic=true"
            )
        if self.granularity == "channel" and self.dynamic:
            raise UserError(
                "a dynamic activation cannot have granularity=channel: its scales would mix tokens; "
                "set dynamic=false, or granularity=token"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Fields by name, those that are younger than plans and fingerprints on disk only where they are used."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value != YOUNGER.get(name, ...)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> QuantSpec:
        """Strict inverse of `to_dict`."""
        kwargs = checked_fields(cls, fields, "QuantSpec")
        if "bits" not in kwargs:
            raise UserError("QuantSpec needs the field 'bits', a whole number from 2 to 8")
        return cls(**kwargs)
