"""Allocation: the bits of every group and segment, within a budget, at the least summed sensitivity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from viditq.errors import UserError
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.scheme import FLOAT_BITS
from viditq.quant.search.budget import Budget
from viditq.quant.search.candidates import Bits, Candidate, Group
from viditq.quant.search.knapsack import SOLVERS, Choice, Option, Problem, check_possible

Assignment = dict[tuple[str, int], Bits]
"""(group, segment) -> bits of weight and activation."""


@dataclass(frozen=True)
class Search:
    """What there is to choose from. base: the plan whose bits are changed; choices: side -> bit-widths. shapes:
    Linear -> (out_features, in_features). shares: layer -> of its sampling steps in each segment; one that has none is
    in no segment's share. float_bytes: of denoisers left in float, which every plan stores.
    """

    base: QuantPlan
    groups: Sequence[Group]
    choices: Mapping[str, Sequence[int]]
    shapes: Mapping[str, tuple[int, int]]
    shares: Mapping[str, Sequence[float]]
    float_bytes: int = 0

    @property
    def cells(self) -> list[tuple[Group, int]]:
        """Every group and each segment that it runs in, one choice each."""
        return [(group, s) for group in self.groups for s in range(self.base.num_segments) if self.share(group, s) > 0]

    @property
    def fixed(self) -> list[str]:
        """Sides with a single width to choose, of which nothing need be known."""
        return [side for side, widths in self.choices.items() if len(widths) == 1]

    def share(self, group: Group, segment: int) -> float:
        """Of the sampling steps of a group's denoiser, those in a segment."""
        return self.shares[group.layers[0]][segment]

    def bits(self) -> list[Bits]:
        """The pairs that a cell may take."""
        weights, activations = (self.choices.get(side) or (FLOAT_BITS,) for side in ("weight", "activation"))
        return list(product(weights, activations))

    def branch_numel(self, group: Group, segment: int, bits: int) -> int:
        """Numbers of the low-rank branches beside the group's weights at these bits; a weight in float has none."""
        schemes = {layer: self.base.scheme(layer, segment) for layer in group.layers if bits != FLOAT_BITS}
        return sum(s.low_rank * sum(self.shapes[layer]) for layer, s in schemes.items() if s and s.low_rank)

    def stored_bytes(self, group: Group, segment: int, bits: int) -> float:
        """Of the group's weights at these bits: packed codes, float32 scales, uint8 zero points and branches of 16
        bits, or float16.
        """
        total = 2.0 * self.branch_numel(group, segment, bits)
        for layer in group.layers:
            rows, columns = self.shapes[layer]
            scheme = self.base.scheme(layer, segment)
            spec = None if scheme is None else scheme.weight
            if spec is None or bits == FLOAT_BITS:
                total += 2 * rows * columns
            else:
                total += rows * math.ceil(columns * bits / 8) + spec.bytes_per_scale * _num_scales(spec, rows, columns)
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
            share = self.share(group, segment)
            of_weights, of_inputs = group.weights_numel / weights * share, group.inputs_numel / inputs * share
            options = []
            for bits in self.bits():
                branch = FLOAT_BITS * self.branch_numel(group, segment, bits[0]) / group.weights_numel
                uses = {"weight_bits": (bits[0] + branch) * of_weights, "activation_bits": bits[1] * of_inputs}
                if budget.latency is not None:
                    uses["latency"] = budget.latency_of(bits) * of_weights
                thing = (group.name, bits[0]) if self.shares_weights(group) else (group.name, bits[0], segment)
                if budget.size_bytes is not None:
                    sizes[thing] = self.stored_bytes(group, segment, bits[0])
                keeps = thing if budget.size_bytes is not None else None
                options.append(Option(_cost(costs, group, segment, bits), uses, keeps))
            cells.append(options)
        return Problem(cells, budget.limits, sizes, budget.size_bytes, self.float_bytes)


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
    problem, pairs = _unlimited(search, budget), search.bits()
    return _uses(problem, tuple(pairs.index(assignment[g.name, s]) for g, s in search.cells))


def check_budget(search: Search, budget: Budget) -> None:
    """Raises UserError for a limit that even the leanest choices exceed, and for a scheme that latency_costs lacks."""
    check_possible(search.problem(_no_costs(search), budget))


def extremes(search: Search, budget: Budget) -> dict[str, tuple[float, float]]:
    """The least and the most that an assignment can use of each thing that `used` tells."""
    problem = _unlimited(search, budget)
    found = {}
    for name in ("size_bytes", *problem.limits):

        def load(option: Option, name: str = name) -> float:
            return problem.sizes[option.keeps] if name == "size_bytes" else option.uses[name]

        ends = [_uses(problem, tuple(_first(map(load, cell), end) for cell in problem.cells)) for end in (min, max)]
        found[name] = ends[0][name], ends[1][name]
    return found


def _first(loads: Iterable[float], extreme: Callable[[list[float]], float]) -> int:
    values = list(loads)
    return values.index(extreme(values))


def _uses(problem: Problem, choice: Choice) -> dict[str, float]:
    return {**problem.used(choice), "size_bytes": problem.size(choice)}


def _unlimited(search: Search, budget: Budget) -> Problem:
    """The knapsack without costs, in which everything fits that `budget` has a name for."""
    latency = math.inf if budget.latency is not None else None
    everything = Budget(math.inf, math.inf, math.inf, latency, budget.latency_costs)
    return search.problem(_no_costs(search), everything)


def _no_costs(search: Search) -> dict[Candidate, float]:
    cells, choices = search.cells, search.choices.items()
    return {Candidate(g.name, s, side, bits): 0.0 for g, s in cells for side, widths in choices for bits in widths}


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
