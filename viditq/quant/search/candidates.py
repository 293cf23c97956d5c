"""What a sensitivity search may choose between: groups of Linears, their bits in each segment, one side at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from viditq.errors import UserError
from viditq.quant.description.blocks import block_of
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.scheme import FLOAT_BITS, LayerScheme

SIDES = ("weight", "activation")
Bits = tuple[int, int]
"""Of the weight and of the activation; 16 = float."""


@dataclass(frozen=True)
class Group:
    """The Linears of one role in one block, which get the same bits; counts are as averages take them."""

    block: str
    role: str
    layers: tuple[str, ...]
    weights_numel: int
    inputs_numel: int

    @property
    def name(self) -> str:
        return f"{self.block}/{self.role}"


@dataclass(frozen=True)
class Candidate:
    """One group, in one segment, with one side (weight or activation) at `bits`, and everything else in float."""

    group: str
    segment: int
    side: str
    bits: int

    @property
    def name(self) -> str:
        """Also a file name."""
        return f"{self.group.replace('/', '-')}.segment{self.segment}.{self.side}{self.bits}"


def groups_of(
    layers: Sequence[str], roles: Mapping[str, str], weights_numel: Mapping[str, int], inputs_numel: Mapping[str, int]
) -> list[Group]:
    """The groups of these Linears, in their order."""
    members: dict[tuple[str, str], list[str]] = {}
    for layer in layers:
        members.setdefault((block_of(layer), roles[layer]), []).append(layer)
    return [
        Group(block, role, tuple(of), sum(weights_numel[n] for n in of), sum(inputs_numel[n] for n in of))
        for (block, role), of in members.items()
    ]


def check_choices(choices: Sequence[int], what: str) -> tuple[int, ...]:
    """Bit-widths in ascending order; raises UserError unless each is 2 to 8, or 16 for float."""
    allowed = {*range(2, 9), FLOAT_BITS}
    is_list = isinstance(choices, Sequence) and not isinstance(choices, str) and choices
    if not is_list or len(set(choices)) != len(choices) or any(b not in allowed for b in choices):
        raise UserError(f"{what}={choices!r}: give different bit-widths from 2 to 8, or 16 (float), such as [4, 6, 8].")
    return tuple(sorted(choices))


def candidates_of(cells: Sequence[tuple[Group, int]], choices: Mapping[str, Sequence[int]]) -> list[Candidate]:
    """Every candidate but those in float. cells: groups with the segments they run in; choices: side -> bit-widths."""
    return [
        Candidate(group.name, segment, side, bits)
        for side, widths in choices.items()
        for bits in widths
        if bits != FLOAT_BITS
        for group, segment in cells
    ]


def with_bits(scheme: LayerScheme, bits: Bits) -> LayerScheme | None:
    """`scheme` at other bits; a side that it leaves in float stays so. None = all in float."""
    formats: dict[str, Any] = {}
    for side, width in zip(SIDES, bits, strict=True):
        spec = getattr(scheme, side)
        formats[side] = None if spec is None or width == FLOAT_BITS else replace(spec, bits=width)
    if formats["weight"] is None:
        formats["low_rank"] = None  # a branch beside a weight that is whole
    return replace(scheme, **formats) if any(formats[side] for side in SIDES) else None


def candidate_plan(base: QuantPlan, group: Group, candidate: Candidate) -> QuantPlan:
    """The plan that quantizes nothing but `candidate`."""
    widths = (candidate.bits, FLOAT_BITS) if candidate.side == "weight" else (FLOAT_BITS, candidate.bits)
    chosen = {(group.name, candidate.segment): widths}
    return assembled(base, [group], chosen)


def assembled(base: QuantPlan, groups: Sequence[Group], bits: Mapping[tuple[str, int], Bits]) -> QuantPlan:
    """`base` with the bits of (group, segment); what `bits` lacks is left in float. Raises UserError without any."""
    schemes: dict[str, LayerScheme] = {}
    layers: dict[str, tuple[str | None, ...]] = {}
    for group in groups:
        for layer in group.layers:
            names = []
            for segment in range(base.num_segments):
                scheme = base.scheme(layer, segment)
                widths = bits.get((group.name, segment), (FLOAT_BITS, FLOAT_BITS))
                changed = None if scheme is None else with_bits(scheme, widths)
                names.append(None if changed is None else _enter(schemes, changed))
            if any(names):
                layers[layer] = tuple(names)
    return QuantPlan(base.edges, schemes, layers)


def _enter(schemes: dict[str, LayerScheme], scheme: LayerScheme) -> str:
    bits = (str(spec.bits) if spec else str(FLOAT_BITS) for spec in (scheme.weight, scheme.activation))
    base = "_".join(["w{}a{}".format(*bits), *(t.name for t in scheme.transforms)])
    names = [base, *(f"{base}_{i}" for i in range(2, len(schemes) + 2))]
    name = next(name for name in names if schemes.get(name, scheme) == scheme)
    schemes[name] = scheme
    return name
