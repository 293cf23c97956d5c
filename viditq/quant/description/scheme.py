"""How one Linear is treated, as frozen descriptions that turn into plain dicts and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from viditq.errors import UserError
from viditq.quant.description.blocks import in_block
from viditq.quant.description.fields import checked_fields, is_int
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.specs import RangeSpec, RoundingSpec, TransformSpec, min_max_range, nearest_rounding

FLOAT_RANGES = ("min_max", "percentile")
FLOAT_BITS = 16  # what a tensor left in float counts as


@dataclass(frozen=True)
class LayerScheme:
    """How one Linear is treated: y = Q_a(T(x)) Q_w(T^-T(W) - U V)^T + T(x) (U V)^T + b. None = "leave in float".

    rounding, ranges: of the weight; activation_ranges: of a static activation (a dynamic one takes its own
    extremes). low_rank: rank of U V, kept in 16 bits; None = no such branch.
    """

    weight: QuantSpec | None
    activation: QuantSpec | None
    transforms: tuple[TransformSpec, ...] = ()
    rounding: RoundingSpec = dataclasses.field(default_factory=nearest_rounding)
    ranges: RangeSpec = dataclasses.field(default_factory=min_max_range)
    activation_ranges: RangeSpec = dataclasses.field(default_factory=min_max_range)
    low_rank: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "transforms", tuple(self.transforms))
        for spec in (self.weight, self.activation):
            if spec is not None and not isinstance(spec, QuantSpec):
                raise UserError(
                    f"weight and activation take a QuantSpec (bits, granularity, ...) or null, got {spec!r}"
                )
        if self.weight is not None:
            self.weight.check_weight()
        if self.activation is not None:
            self.activation.check_activation()
        object.__setattr__(self, "rounding", RoundingSpec.parse(self.rounding))
        for field in ("ranges", "activation_ranges"):
            object.__setattr__(self, field, RangeSpec.parse(getattr(self, field)))
        self._check_transforms()
        self._check_low_rank()
        self._check_numbers()

    def _check_transforms(self) -> None:
        for place, transform in enumerate(self.transforms):
            if transform.for_segment(0, 1) != transform:
                raise UserError(f"{transform} is not resolved: a scheme holds the values of one segment")
            if place and transform.needs_stats:
                raise UserError(
                    f"{transform.name} must come first among the transforms: its statistics are those of the layer's "
                    f"own input, not of what {self.transforms[0].name} makes of it"
                )

    def _check_low_rank(self) -> None:
        if self.low_rank is None:
            return
        if not is_int(self.low_rank) or self.low_rank < 1:
            raise UserError(
                f"low_rank={self.low_rank!r} is not possible: give the rank of the branch in 16 bits, a whole number "
                "from 1 to the narrower side of the weights, such as 32; or null, for no branch"
            )
        if self.weight is None:
            raise UserError("low_rank needs a quantized weight: what it leaves over is what gets quantized")

    def _check_numbers(self) -> None:
        """What is searched or learned is searched on grids of equal steps."""
        for side, spec in (("weight", self.weight), ("activation", self.activation)):
            ranges = self.ranges if side == "weight" else self.activation_ranges
            if spec is not None and spec.is_float and ranges.name not in FLOAT_RANGES:
                allowed = " or ".join(FLOAT_RANGES)
                raise UserError(f"{side}.number={spec.number} goes with ranges {allowed}, not {ranges.name}")
        if self.weight is not None and self.weight.is_float and self.rounding.name != "nearest":
            raise UserError(
                f"weight.number={self.weight.number} goes with rounding nearest, not {self.rounding.name}; set "
                "quant/rounding=nearest, or choose an integer format"
            )

    @property
    def quantizes(self) -> bool:
        """Whether weight or activation is quantized at all."""
        return self.weight is not None or self.activation is not None

    @property
    def static_activation(self) -> bool:
        return self.activation is not None and not self.activation.dynamic

    @property
    def needs_moments(self) -> bool:
        """Whether second moments of the layer's input are needed to apply it, but to layers that `learned_in_block`."""
        return self.weight is not None and self.rounding.needs_moments

    @property
    def rows_apart(self) -> bool:
        """Whether a weight's row becomes the same codes, to the bit, whichever rows are quantized with it."""
        spec = self.weight
        alone = (
            spec is not None and spec.granularity != "tensor" and spec.block_scale != "e4m3" and self.low_rank is None
        )
        fitted_apart = self.rounding.rows_apart and self.ranges.rows_apart
        return alone and fitted_apart and all(transform.rows_apart for transform in self.transforms)

    def learned_in_block(self, layer: str) -> bool:
        """Whether the weight of this layer is rounded together with the rest of its block."""
        return self.weight is not None and self.rounding.learns_blocks and in_block(layer)

    def moments_for(self, layer: str) -> bool:
        """Whether second moments of the input of this layer are needed."""
        return self.needs_moments and not self.learned_in_block(layer)

    @property
    def needs_stats(self) -> bool:
        """Whether calibration statistics are needed to apply it."""
        return self.static_activation or self.needs_moments or any(t.needs_stats for t in self.transforms)

    @property
    def per_segment(self) -> bool:
        """Whether its tensors differ from one segment to the next."""
        return self.static_activation or any(t.differs_by_segment for t in self.transforms)

    def to_dict(self) -> dict[str, Any]:
        return {
            "weight": self.weight and self.weight.to_dict(),
            "activation": self.activation and self.activation.to_dict(),
            "transforms": [t.to_dict() for t in self.transforms],
            "rounding": self.rounding.to_dict(),
            "ranges": self.ranges.to_dict(),
            "activation_ranges": self.activation_ranges.to_dict(),
            "low_rank": self.low_rank,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LayerScheme:
        """Strict inverse of `to_dict`: every field must be there, no other may be."""
        kwargs = checked_fields(cls, fields, "LayerScheme")
        for field in dataclasses.fields(cls):
            if field.name not in kwargs:
                raise UserError(f"LayerScheme lacks the field {field.name!r}")
        for side in ("weight", "activation"):
            if kwargs[side] is not None:
                kwargs[side] = QuantSpec.from_dict(kwargs[side])
        if not isinstance(kwargs["transforms"], list):
            raise UserError(f"transforms of a LayerScheme must be a list, got {kwargs['transforms']!r}")
        kwargs["transforms"] = tuple(TransformSpec.from_dict(t) for t in kwargs["transforms"])
        return cls(**kwargs)
