"""Allocation: the bits of every group and segment, within a budget, at the least summed sensitivity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

from viditq.errors import UserError
from viditq.knapsack import SOLVERS, Option, Problem
from viditq.quant.candidates import Bits, Candidate, Group
from viditq.quant.plan import QuantPlan
from viditq.quant.scheme import FLOAT_BITS, QuantSpec

Assignment = dict[tuple[str, int], Bits]
"""(group, segment) -> bits of weight and activation."""


@dataclass(frozen=True)
class Budget:
    """Upper limits, None = no limit; averages are over the Linears that are quantized (not those kept in float).

    weight_bits, activation_bits: as `QuantPlan` averages them, segments by their share of the sampling steps.
    size_bytes: of the stored weights of these Linears (codes, scales, zero points); equal weights of several segments
    count once. latency: relative to all in float, a mean over weights of `latency_costs` (scheme such as w4a8 -> cost,
    float = 1).
    """

    weight_bits: float | None = None
    activation_bits: float | None = None
    size_bytes: float | None = None
    latency: float | None = None
    latency_costs: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "latency_costs"}
        for name, value in given.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
                raise UserError(f"the budget's {name}={value!r} must be a number above 0, or null for no limit.")
        if all(value is None for value in given.values()):
            raise UserError(f"the search has no budget: give at least one of {', '.join(given)}.")
        if self.latency is not None and not self.latency_costs:
            raise UserError("a budget of latency needs latency_costs, such as {w8a8: 0.58, w4a8: 0.72, w16a16: 1}.")

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are sums."""
        names = ("weight_bits", "activation_bits", "latency")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def latency_of(self, bits: Bits) -> float:
        """Cost of a scheme; raises UserError when the table lacks it."""
        name, costs = "w{}a{}".format(*bits), self.latency_costs or {}
        if name not in costs:
            raise UserError(f"latency_costs has no {name}; it needs every combination of the choices.")
        return float(costs[name])


@dataclass(frozen=True)
class Search:
    """What there is to choose from. base: the plan whose bits are changed; choices: side -> bit-widths. shapes:
    Linear -> (out_features, in_features). shares: of the sampling steps in each segment.
    """

    base: QuantPlan
    groups: Sequence[Group]
    choices: Mapping[str, Sequence[int]]
    shapes: Mapping[str, tuple[int, int]]
    shares: Sequence[float]

    @property
    def cells(self) -> list[tuple[Group, int]]:
        """Every group and segment, one choice each."""
        return [(group, segment) for group in self.groups for segment in range(self.base.num_segments)]

    def bits(self) -> list[Bits]:
        """The pairs that a cell may take."""
        weights, activations = (self.choices.get(side) or (FLOAT_BITS,) for side in ("weight", "activation"))
        return list(product(weights, activations))

    def stored_bytes(self, group: Group, segment: int, bits: int) -> float:
        """Of the group's weights at these bits: packed codes, float32 scales and uint8 zero points, or float16."""
        total = 0.0
        for layer in group.layers:
            rows, columns = self.shapes[layer]
            scheme = self.base.scheme(layer, segment)
            spec = None if scheme is None else scheme.weight
            if spec is None or bits == FLOAT_BITS:
                total += 2 * rows * columns
            else:
                per_scale = 4 if spec.symmetric else 5
                total += rows * math.ceil(columns * bits / 8) + per_scale * _num_scales(spec, rows, columns)
        return total

    def shares_weights(self, group: Group) -> bool:
        """Whether segments of equal weight bits keep the same tensors: nothing is fitted per segment."""
        schemes = (self.base.scheme(layer, s) for layer in group.layers for s in range(self.base.num_segments))
        of_weight = [(s.weight, s.transforms) for s in schemes if s is not None]
        per_segment = any(t.differs_by_segment for _, transforms in of_weight for t in transforms)
        return not per_segment

    def problem(self, costs: Mapping[Candidate, float], budget: Budget) -> Problem:
        """The knapsack; raises UserError if a candidate has no cost."""
        weights, inputs = (sum(getattr(g, f"{what}_numel") for g in self.groups) for what in ("weights", "inputs"))
        sizes: dict[Any, float] = {}
        cells = []
        for group, segment in self.cells:
            share = self.shares[segment]
            of_weights, of_inputs = group.weights_numel / weights * share, group.inputs_numel / inputs * share
            options = []
            for bits in self.bits():
                uses = {"weight_bits": bits[0] * of_weights, "activation_bits": bits[1] * of_inputs}
                if budget.latency is not None:
                    uses["latency"] = budget.latency_of(bits) * of_weights
                thing = (group.name, bits[0]) if self.shares_weights(group) else (group.name, bits[0], segment)
                if budget.size_bytes is not None:
                    sizes[thing] = self.stored_bytes(group, segment, bits[0])
                keeps = thing if budget.size_bytes is not None else None
                options.append(Option(_cost(costs, group, segment, bits), uses, keeps))
            cells.append(options)
        return Problem(cells, budget.limits, sizes, budget.size_bytes)


def allocate(search: Search, costs: Mapping[Candidate, float], budget: Budget, solver: str = "exact") -> Assignment:
    """The cheapest bits within the budget; solver: exact or greedy. Raises UserError when the budget is impossible."""
    problem = search.problem(costs, budget)
    choice, pairs = SOLVERS[solver](problem), search.bits()
    return {(g.name, segment): pairs[i] for (g, segment), i in zip(search.cells, choice, strict=True)}


def allocate_by_role(
    search: Search,
    by_output: Mapping[Candidate, float],
    by_metric: Mapping[Candidate, float],
    metrics: Mapping[str, str],
    budget: Budget,
    solver: str = "exact",
) -> Assignment:
    """ViDiT-Q's two steps: output error shares the budget out between the metrics; each metric's roles then share that.

    by_output: costs as errors of the output; by_metric: as changes of the metric that each group's role governs;
    metrics: role -> that metric.
    """
    whole = allocate(search, by_output, budget, solver)
    assignment: Assignment = {}
    for metric in dict.fromkeys(metrics[group.role] for group in search.groups):
        part = replace(search, groups=[group for group in search.groups if metrics[group.role] == metric])
        given = used(part, {cell: whole[cell] for cell in whole if cell[0] in {g.name for g in part.groups}}, budget)
        limits: dict[str, Any] = {name: value for name, value in given.items() if getattr(budget, name) is not None}
        assignment |= allocate(part, by_metric, replace(budget, **limits), solver)
    return {(g.name, segment): assignment[g.name, segment] for g, segment in search.cells}


def used(search: Search, assignment: Assignment, budget: Budget) -> dict[str, float]:
    """What an assignment uses: weight_bits, activation_bits, size_bytes, and latency where it has costs."""
    zero = dict.fromkeys(
        (Candidate(g.name, s, side, b) for g, s in search.cells for side, w in search.choices.items() for b in w), 0.0
    )
    wanted = replace(
        budget,
        weight_bits=float(FLOAT_BITS),
        activation_bits=float(FLOAT_BITS),
        size_bytes=math.inf,
        latency=math.inf if budget.latency is not None else None,
    )
    problem, pairs = search.problem(zero, wanted), search.bits()
    choice = tuple(pairs.index(assignment[g.name, s]) for g, s in search.cells)
    return {**problem.used(choice), "size_bytes": problem.size(choice)}


def cost_of(search: Search, costs: Mapping[Candidate, float], assignment: Assignment) -> float:
    """Summed cost of an assignment."""
    return sum(_cost(costs, g, s, assignment[g.name, s]) for g, s in search.cells)


def _cost(costs: Mapping[Candidate, float], group: Group, segment: int, bits: Bits) -> float:
    total = 0.0
    for side, width in zip(("weight", "activation"), bits, strict=True):
        if width != FLOAT_BITS:
            candidate = Candidate(group.name, segment, side, width)
            if candidate not in costs:
                raise UserError(f"{candidate.name} was not measured; search again with these choices.")
            total += costs[candidate]
    return total


def _num_scales(spec: QuantSpec, rows: int, columns: int) -> int:
    per_row = columns // (spec.group_size or columns)
    return 1 if spec.granularity == "tensor" else rows * per_row
