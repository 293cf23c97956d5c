"""The plan of a run, role by role."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

FLOAT_BITS = 16
FLOAT = "float"


@dataclass(frozen=True)
class RolePlan:
    """How the Linears of one role are treated.

    `weight_bits` and `activation_bits` are means over the Linears, one per segment (16 = float); `schemes` are the
    names in use, one tuple per segment. Segments ascend in noise level.
    """

    role: str
    num_linears: int
    weight_bits: tuple[float, ...]
    activation_bits: tuple[float, ...]
    schemes: tuple[tuple[str, ...], ...]


def summarize_plan(plan: Mapping[str, Any], roles: Mapping[str, str]) -> tuple[RolePlan, ...]:
    """Group a plan as plan.json holds it (edges, schemes, layers) by `roles` (Linear -> role, for all Linears)."""
    groups: dict[str, list[str]] = {}
    for layer, role in roles.items():
        groups.setdefault(role, []).append(layer)
    num_segments = len(plan["edges"]) - 1
    return tuple(_summarize(role, layers, plan, num_segments) for role, layers in groups.items())


def segment_words(edges: Iterable[float]) -> tuple[str, ...]:
    """`0–0.5` for each segment."""
    return tuple(f"{low:g}–{high:g}" for low, high in pairwise(edges))


def _summarize(role: str, layers: list[str], plan: Mapping[str, Any], num_segments: int) -> RolePlan:
    left_float = [None] * num_segments
    names = [[plan["layers"].get(layer, left_float)[segment] for layer in layers] for segment in range(num_segments)]
    return RolePlan(
        role=role,
        num_linears=len(layers),
        weight_bits=tuple(fmean(_bits(plan, name, "weight") for name in segment) for segment in names),
        activation_bits=tuple(fmean(_bits(plan, name, "activation") for name in segment) for segment in names),
        schemes=tuple(tuple(dict.fromkeys(name or FLOAT for name in segment)) for segment in names),
    )


def _bits(plan: Mapping[str, Any], scheme: str | None, which: str) -> int:
    spec = None if scheme is None else plan["schemes"][scheme][which]
    return FLOAT_BITS if spec is None else int(spec["bits"])
