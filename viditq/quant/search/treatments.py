"""Treatments: everything that can be done to one part of a denoiser, as a product of short lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from viditq.errors import UserError, close_names
from viditq.quant.description.fields import is_int
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.scheme import FLOAT_BITS, LayerScheme
from viditq.quant.description.specs import RangeSpec, RoundingSpec, TransformSpec
from viditq.quant.methods.ranges import LpSearch
from viditq.quant.methods.rounding import Gptq
from viditq.quant.methods.transforms import ConvRotSpec, RotateSpec, SmoothSpec
from viditq.quant.methods.transforms.convrot import GROUP_SIZES
from viditq.quant.search.candidates import Bits, check_choices

# Named as in conf/quant/smoothing; scales from the largest values, which suit 4 bits and less.
TRANSFORMS: Mapping[str, tuple[TransformSpec, ...]] = {
    "none": (),
    "static": (SmoothSpec(0.5, aggregate="max"),),
    "timestep_aware": (SmoothSpec(0.5, per_segment=True, aggregate="max"),),
    "rotate": (RotateSpec(),),
    "convrot": (ConvRotSpec(),),
    "scale_rotate": (SmoothSpec(0.3, aggregate="max"), RotateSpec()),
}
ROTATING = tuple(n for n, of in TRANSFORMS.items() if any(isinstance(one, RotateSpec | ConvRotSpec) for one in of))
ROUNDINGS: Mapping[str, RoundingSpec] = {"nearest": RoundingSpec.parse("nearest"), "gptq": Gptq()}
RANGES: Mapping[str, RangeSpec] = {"min_max": RangeSpec.parse("min_max"), "lp": LpSearch(num_shrinks=40)}
MIDDLE_BITS = 4  # of weights, at which transforms and roundings are told apart; errors at 8 are those of activations
NAMED: Mapping[str, Mapping[str, Any]] = {"transforms": TRANSFORMS, "roundings": ROUNDINGS, "ranges": RANGES}


@dataclass(frozen=True)
class Treatment:
    """What is done to all Linears of one part, in every segment of noise level.

    transform, rounding, ranges: names of this module's tables. group: inputs that share a scale, 0 = a scale for each
    output channel and token. low_rank: of a branch in 16 bits, 0 = none.
    """

    transform: str
    weight_bits: int
    activation_bits: int
    group: int
    rounding: str
    ranges: str
    low_rank: int

    @property
    def name(self) -> str:
        """Short, and different for each."""
        parts = [f"w{self.weight_bits}a{self.activation_bits}", f"group{self.group}" * bool(self.group)]
        parts += ["" if name in ("none", "nearest", "min_max") else name for name in self._names]
        return "_".join(part for part in (*parts, f"rank{self.low_rank}" * bool(self.low_rank)) if part)

    @property
    def _names(self) -> tuple[str, str, str]:
        return self.transform, self.ranges, self.rounding

    @property
    def per_segment(self) -> bool:
        """Whether weights are stored for each segment."""
        return any(transform.differs_by_segment for transform in TRANSFORMS[self.transform])

    @property
    def rotates(self) -> bool:
        """Whether inputs are rotated at every step."""
        return self.transform in ROTATING

    @property
    def bits(self) -> Bits:
        """Of weight and activation."""
        return self.weight_bits, self.activation_bits

    def scheme(self, symmetric: bool) -> LayerScheme:
        """As a plan has it. symmetric: zero points of 0 on both sides."""
        group = {"granularity": "group", "group_size": self.group}
        of_weight: dict[str, Any] = group if self.group else {"granularity": "channel"}
        of_input: dict[str, Any] = group if self.group else {"granularity": "token"}
        activation = None
        if self.activation_bits != FLOAT_BITS:
            activation = QuantSpec(self.activation_bits, symmetric, dynamic=True, **of_input)
        return LayerScheme(
            QuantSpec(self.weight_bits, symmetric, **of_weight),
            activation,
            TRANSFORMS[self.transform],
            ROUNDINGS[self.rounding],
            RANGES[self.ranges],
            low_rank=self.low_rank or None,
        )


@dataclass(frozen=True)
class Menu:
    """The lists that treatments are made of, first the ones to take where nothing else is better."""

    transforms: tuple[str, ...]
    weight_choices: tuple[int, ...]
    activation_choices: tuple[int, ...]
    groups: tuple[int, ...]
    roundings: tuple[str, ...]
    ranges: tuple[str, ...]
    low_ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, table in NAMED.items():
            for value in self._several(name):
                if value not in table:
                    raise UserError(f"quant.policy.{name} has {value!r}; {close_names(str(value), table)}.")
        for name in ("weight_choices", "activation_choices"):
            object.__setattr__(self, name, check_choices(getattr(self, name), f"quant.policy.{name}"))
        if FLOAT_BITS in self.weight_choices:
            raise UserError("quant.policy.weight_choices: 16 is no treatment; leave Linears in float by quant.rules.")
        for name, what in (("groups", "inputs that share a scale"), ("low_ranks", "the rank of a branch in 16 bits")):
            if any(not is_int(value) or value < 0 for value in self._several(name)):
                raise UserError(
                    f"quant.policy.{name}={list(getattr(self, name))!r}: give {what}, 0 = none, such as [0, 64]."
                )

    def _several(self, name: str) -> Sequence[Any]:
        values = getattr(self, name)
        if isinstance(values, str) or not isinstance(values, Sequence) or not values or len({*values}) != len(values):
            raise UserError(f"quant.policy.{name}={values!r}: give a list of different values, one at least.")
        object.__setattr__(self, name, tuple(values))
        return tuple(values)

    @property
    def demanding(self) -> Treatment:
        """What calibration has to see most for: second moments, and statistics of each segment."""

        def seen(name: str) -> int:
            return sum(transform.needs_stats + transform.differs_by_segment for transform in TRANSFORMS[name])

        needs = [r for r in self.roundings if ROUNDINGS[r].needs_moments] or self.roundings
        widths = self.weight_choices[-1], self.activation_choices[-1]
        transform = max(self.transforms, key=seen)
        return Treatment(transform, *widths, min(self.groups), needs[0], self.ranges[0], min(self.low_ranks))

    @property
    def lean(self) -> list[Treatment]:
        """The fewest bits, with any transform and group: the fewest bytes are among them."""
        widths = self.weight_choices[0], self.activation_choices[0]
        how = self.roundings[0], self.ranges[0]
        return [
            Treatment(transform, *widths, group, *how, low_rank=min(self.low_ranks))
            for transform, group in product(self.transforms, self.groups)
        ]

    @property
    def middle_bits(self) -> int:
        """Of weights, at which transforms are compared."""
        return next((bits for bits in self.weight_choices if bits >= MIDDLE_BITS), self.weight_choices[-1])

    @property
    def fitted_bits(self) -> tuple[int, ...]:
        """Widths of weights that are fitted: of more than three two, from which the errors of others follow."""
        few = (self.middle_bits, self.weight_choices[-1])
        return few if len(self.weight_choices) > 3 else self.weight_choices

    def plain(self, transform: str) -> Treatment:
        """At middle widths, with the first group, rounding, range and rank: what transforms are compared by."""
        widths = self.middle_bits, self.activation_choices[-1]
        how = self.roundings[0], self.ranges[0]
        return Treatment(transform, *widths, self.groups[0], *how, low_rank=self.low_ranks[0])

    def possible(self, shapes: Sequence[tuple[int, int]]) -> Menu:
        """Without what Linears of these shapes (out_features, in_features) cannot have.

        Raises UserError where nothing is left of a list.
        """
        groups = tuple(g for g in self.groups if not g or all(columns % g == 0 for _, columns in shapes))
        ranks = tuple(r for r in self.low_ranks if all(r < min(shape) for shape in shapes))
        turns = all(columns % min(GROUP_SIZES) == 0 for _, columns in shapes)
        transforms = tuple(name for name in self.transforms if turns or name != "convrot")
        for name, left in (("groups", groups), ("low_ranks", ranks), ("transforms", transforms)):
            if not left:
                given = list(getattr(self, name))
                raise UserError(
                    f"quant.policy.{name}={given}: nothing of it is possible for Linears of {shapes[0][1]} inputs and "
                    f"{shapes[0][0]} outputs. Add another choice, such as {'none' if name == 'transforms' else 0}."
                )
        return replace(self, groups=groups, low_ranks=ranks, transforms=transforms)
