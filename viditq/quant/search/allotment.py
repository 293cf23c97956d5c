"""Allotment: the treatment of every part within a budget, at the least summed error of the denoiser's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from viditq.errors import UserError
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.scheme import FLOAT_BITS, LayerScheme
from viditq.quant.execution.variant import empty_variant
from viditq.quant.search.budget import Budget
from viditq.quant.search.candidates import Group
from viditq.quant.search.knapsack import Option, Problem, solve_exact
from viditq.quant.search.treatments import MIDDLE_BITS, Menu, Treatment

TENSOR_BYTES = 300  # about what headers and digests of an artifact say of each tensor
SIZE = "size"
Treated = dict[str, Treatment]
"""Name of a part -> what is done to it."""


@lru_cache(maxsize=4096)  # laying out tensors takes a millisecond, and most Linears are like another
def _tensor_bytes(treatment: Treatment, symmetric: bool, rows: int, columns: int) -> int:
    tensors = empty_variant(treatment.scheme(symmetric), columns, rows, torch.float16).state_dict().values()
    return sum(tensor.numel() * tensor.element_size() + TENSOR_BYTES for tensor in tensors)


@dataclass(frozen=True)
class Part:
    """Linears that are treated alike. shapes: (out_features, in_features) of each. menu: what is possible for them."""

    group: Group
    shapes: tuple[tuple[int, int], ...]
    menu: Menu
    num_segments: int
    symmetric: bool

    @property
    def name(self) -> str:
        return self.group.name

    def stored_bytes(self, treatment: Treatment) -> int:
        """Of all that an artifact keeps of these Linears but their biases."""
        times = self.num_segments if treatment.per_segment else 1
        return times * sum(_tensor_bytes(treatment, self.symmetric, *shape) for shape in self.shapes)

    def uses(self, treatment: Treatment, budget: Budget, whole: tuple[int, int]) -> dict[str, float]:
        """Of each limit but the size. whole: weights and inputs of all parts."""
        weight_bits, activation_bits = treatment.bits
        of_weights, of_inputs = self.group.weights_numel / whole[0], self.group.inputs_numel / whole[1]
        branch = FLOAT_BITS * treatment.low_rank * sum(sum(shape) for shape in self.shapes) / self.group.weights_numel
        uses = {"weight_bits": (weight_bits + branch) * of_weights, "activation_bits": activation_bits * of_inputs}
        if budget.latency is not None:
            uses["latency"] = budget.latency_of(treatment.bits, treatment.transform) * of_weights
        return uses


Costs = Mapping[str, Mapping[Treatment, float]]
"""Name of a part -> what each treatment of it costs."""


def anchor_of(errors: Mapping[Treatment, float]) -> Treatment:
    """The treatment that a part's error in the denoiser's output is measured with; others follow by their own errors.

    The best of middle widths and no branch, near what most parts get: the further a treatment lies from it, the less
    the ratio of their errors says.
    """
    fewest = min({t.weight_bits for t in errors if t.weight_bits >= MIDDLE_BITS} or {t.weight_bits for t in errors})
    rank = min(t.low_rank for t in errors)
    return min((t for t in errors if t.weight_bits == fewest and t.low_rank == rank), key=lambda t: errors[t])


def allotted(parts: Sequence[Part], costs: Costs, budget: Budget, room: float | None) -> Treated:
    """The cheapest treatments within the budget; room: bytes for these parts, None = any. Raises UserError if there are
    none.
    """
    problem, options = _problem(parts, costs, budget, room)
    choice = solve_exact(problem)
    return {part.name: of[i] for part, of, i in zip(parts, options, choice, strict=True)}


def evenly(parts: Sequence[Part], costs: Costs, budget: Budget, room: float | None) -> Treated | None:
    """The cheapest of those that give all parts the same widths, group and rank; None where none fits."""
    found: list[Treated] = []
    for kind in set.intersection(*({_kind(treatment) for treatment in costs[part.name]} for part in parts)):
        alike = {name: {t: cost for t, cost in of.items() if _kind(t) == kind} for name, of in costs.items()}
        with suppress(UserError):  # it does not fit
            found.append(allotted(parts, alike, budget, room))
    return min(found, key=partial(cost_of, costs), default=None)


def _kind(treatment: Treatment) -> tuple[int, int, int, int]:
    return treatment.weight_bits, treatment.activation_bits, treatment.group, treatment.low_rank


def _problem(
    parts: Sequence[Part], costs: Costs, budget: Budget, room: float | None
) -> tuple[Problem, list[list[Treatment]]]:
    whole = sum(p.group.weights_numel for p in parts), sum(p.group.inputs_numel for p in parts)
    limits = {name: value for name, value in budget.limits.items() if name != SIZE}
    limits |= {} if room is None else {SIZE: room}
    options = [[*costs[part.name]] for part in parts]
    cells = []
    for part, treatments in zip(parts, options, strict=True):
        uses = ({**part.uses(t, budget, whole), SIZE: float(part.stored_bytes(t))} for t in treatments)
        cells.append([Option(costs[part.name][t], u) for t, u in zip(treatments, uses, strict=True)])
    return Problem(cells, limits), options


def cost_of(costs: Costs, treated: Treated) -> float:
    """Summed cost."""
    return sum(costs[name][treatment] for name, treatment in treated.items())


def used(parts: Sequence[Part], treated: Treated, budget: Budget) -> dict[str, float]:
    """Average bits, bytes of these parts, and latency where it has costs."""
    whole = sum(p.group.weights_numel for p in parts), sum(p.group.inputs_numel for p in parts)
    total: dict[str, float] = {}
    for part in parts:
        treatment = treated[part.name]
        uses = {**part.uses(treatment, budget, whole), SIZE: float(part.stored_bytes(treatment))}
        total = {name: total.get(name, 0.0) + value for name, value in uses.items()}
    return total


def leanest(parts: Sequence[Part]) -> Treated:
    """Of every part what takes the fewest bytes."""
    return {part.name: min(part.menu.lean, key=part.stored_bytes) for part in parts}


def treated_plan(edges: Sequence[float], parts: Sequence[Part], treated: Treated) -> QuantPlan:
    """The plan that treats these parts so; other Linears stay in float."""
    schemes: dict[str, LayerScheme] = {}
    layers: dict[str, tuple[str | None, ...]] = {}
    for part in parts:
        treatment = treated[part.name]
        schemes[treatment.name] = treatment.scheme(part.symmetric)
        layers |= dict.fromkeys(part.group.layers, (treatment.name,) * part.num_segments)
    return QuantPlan(tuple(edges), schemes, layers)
