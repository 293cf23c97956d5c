"""The policy `sensitivity`: a plan found by measuring what each part costs (ViDiT-Q, metric-decoupled)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from viditq.errors import UserError
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.policy import Uniform
from viditq.quant.description.recipe import Recipe
from viditq.quant.search.allocate import Assignment, Search, allocate, allocate_by_role, check_budget, extremes
from viditq.quant.search.budget import Budget
from viditq.quant.search.candidates import Candidate, Group, assembled, check_choices, groups_of
from viditq.quant.search.costs import MEASURES
from viditq.quant.search.knapsack import SOLVERS

OBJECTIVES = ("roles", "output")
AVERAGES = ("mean", "geometric")
DEFAULT = "default"


@dataclass(frozen=True)
class SensitivitySearch:
    """Settings of a search; `plan` is only its start, the recipe as it stands, whose bits the search changes.

    weight_choices, activation_choices: bit-widths to choose from, 16 = float; a side that the recipe leaves in float
    stays so. budget: see `Budget`. measure: all | pruned | proxy, see `table.to_measure`; prune: its share.
    num_prompts: of the calibration prompts, each candidate is generated for (all, where there are fewer). objective:
    roles (output error shares the budget between roles, a role's own metric decides inside it) | output (output error
    alone). average: of the errors over prompts, geometric (a few failing prompts do not decide) | mean. solver: exact |
    greedy. metrics: role (or "default") -> configuration of a metric with one score per prompt. curve: shares (0 .. 1)
    of the way from the budget to the widest choices at which predicted and measured quality are also reported.
    """

    budget: Mapping[str, Any]
    weight_choices: Sequence[int]
    activation_choices: Sequence[int]
    measure: str
    prune: float
    num_prompts: int
    objective: str
    average: str
    solver: str
    metrics: Mapping[str, Any]
    curve: Sequence[float] = ()
    parsed_budget: Budget = field(init=False)
    files: ClassVar[Sequence[Path]] = ()

    def __post_init__(self) -> None:
        unknown = set(self.budget) - {f for f in Budget.__dataclass_fields__}
        if unknown:
            known = ", ".join(Budget.__dataclass_fields__)
            raise UserError(f"quant.policy.budget has no field {sorted(unknown)[0]!r}; it has {known}.")
        object.__setattr__(self, "parsed_budget", Budget(**self.budget))
        for name in ("weight_choices", "activation_choices"):
            object.__setattr__(self, name, check_choices(getattr(self, name), f"quant.policy.{name}"))
        allowed = {"measure": MEASURES, "objective": OBJECTIVES, "average": AVERAGES, "solver": (*SOLVERS,)}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise UserError(f"quant.policy.{name}={getattr(self, name)!r}: choose one of {', '.join(values)}.")
        if self.solver == "greedy" and self.parsed_budget.size_bytes is not None:
            raise UserError(
                "quant.policy.solver=greedy changes one segment at a time, which stores both widths, and so gets stuck "
                "under a budget of size_bytes; use solver=exact."
            )
        if not isinstance(self.num_prompts, int) or isinstance(self.num_prompts, bool) or self.num_prompts < 1:
            raise UserError(f"quant.policy.num_prompts={self.num_prompts!r} must be a whole number of at least 1.")
        if isinstance(self.prune, bool) or not isinstance(self.prune, int | float) or not 0 <= self.prune < 1:
            raise UserError(f"quant.policy.prune={self.prune!r} must be a number from 0 to below 1.")
        if any(not isinstance(share, int | float) or not 0 <= share <= 1 for share in self.curve):
            raise UserError(f"quant.policy.curve={list(self.curve)!r} must list numbers from 0 to 1.")
        if nulls := [name for name, metric in self.metrics.items() if metric is None]:
            raise UserError(f"quant.policy.metrics.{nulls[0]}=null: take it out with ~quant.policy.metrics.{nulls[0]}.")
        if DEFAULT not in self.metrics:
            raise UserError("quant.policy.metrics needs the entry 'default', for roles that it does not name.")

    def plan(self, recipe: Recipe, linear_names: Sequence[str], keep_float: Sequence[str]) -> QuantPlan:
        """What the search starts from. Raises UserError if the recipe quantizes nothing."""
        base = Uniform().plan(recipe, linear_names, keep_float)
        if not base.layers:
            raise UserError("quant/policy=sensitivity changes the bits of a recipe; choose one, such as quant=w4a8.")
        return base

    def check(
        self,
        base: QuantPlan,
        roles: Mapping[str, str],
        shapes: Mapping[str, tuple[int, int]],
        usual_roles: Sequence[str],
        float_bytes: int = 0,
    ) -> None:
        """Raises UserError for what a search of this plan could not use; nothing has been calibrated yet.

        usual_roles: of other models, which `metrics` may name.
        """
        known = sorted({*usual_roles, *(roles[layer] for layer in base.layers)})
        unknown = [name for name in self.metrics if name not in (DEFAULT, *known)]
        if unknown:
            raise UserError(f"quant.policy.metrics names {unknown[0]!r}, which is no role: {', '.join(known)}.")
        # wherever the steps fall, a plan takes no less than with all of them in one segment
        one = [1.0] + [0.0] * (base.num_segments - 1)
        check_budget(self.search(base, roles, shapes, dict.fromkeys(base.layers, one), float_bytes), self.parsed_budget)

    def search(
        self,
        base: QuantPlan,
        roles: Mapping[str, str],
        shapes: Mapping[str, tuple[int, int]],
        shares: Mapping[str, Sequence[float]],
        float_bytes: int = 0,
    ) -> Search:
        """What there is to choose from; roles, shapes (out_features, in_features) and shares of the steps
        (`step_shares`) of every Linear of `base`; float_bytes: of denoisers left in float. Raises UserError for one
        that never runs.
        """
        idle = [layer for layer in base.layers if layer not in shares]
        if idle:
            raise UserError(
                f"{idle[0]} never ran during calibration ({len(idle)} such Linears), so there is nothing to measure of "
                "it: leave it in float by a rule (quant.rules), or calibrate with more sampling steps."
            )
        numel = {name: rows * columns for name, (rows, columns) in shapes.items()}
        groups = groups_of(list(base.layers), roles, numel, {name: columns for name, (_, columns) in shapes.items()})
        schemes = [base.scheme(layer, segment) for layer in base.layers for segment in range(base.num_segments)]
        sides = {"weight": self.weight_choices, "activation": self.activation_choices}
        choices = {side: c for side, c in sides.items() if any(getattr(s, side) for s in schemes if s is not None)}
        return Search(base, groups, choices, shapes, shares, float_bytes)

    def metric_of(self, role: str) -> str:
        """The entry of `metrics` that governs a role."""
        return role if role in self.metrics else DEFAULT

    def rivals(self, search: Search) -> Callable[[Candidate], str]:
        """What candidates that are weighed against each other have in common: with roles, their metric."""
        if self.objective == "output":
            return lambda candidate: "output"
        groups = groups_by_name(search)
        return lambda candidate: self.metric_of(groups[candidate.group].role)

    def allocated(
        self, search: Search, output: Mapping[Candidate, float], metric: Mapping[Candidate, float], budget: Budget
    ) -> Assignment:
        """The bits that costs by output error and by metric lead to."""
        if self.objective == "roles":
            metrics = {group.role: self.metric_of(group.role) for group in search.groups}
            return allocate_by_role(search, output, metric, metrics, budget, self.solver)
        return allocate(search, output, budget, self.solver)

    def budgets(self, search: Search, shares: Sequence[float]) -> list[Budget]:
        """Limits at these shares of the way from the budget to the widest choices, all of them moved together."""
        return [self._between(search, self.parsed_budget.given, share) for share in shares]

    def ladder(self, search: Search, num: int) -> list[Budget]:
        """`num` budgets from the leanest choices to the widest."""
        ends = extremes(search, self.parsed_budget)
        leanest = {name: ends[name][0] for name in self.parsed_budget.given}
        return [self._between(search, leanest, i / (num - 1)) for i in range(num)]

    def _between(self, search: Search, start: Mapping[str, float], share: float) -> Budget:
        ends = extremes(search, self.parsed_budget)
        moved: dict[str, Any] = {n: value + share * max(ends[n][1] - value, 0.0) for n, value in start.items()}
        return replace(self.parsed_budget, **moved)


def found_plan(search: Search, assignment: Assignment) -> QuantPlan:
    """The plan of an assignment; where a group never runs it keeps the bits of the nearest segment in which it does."""
    bits = dict(assignment)
    for group in search.groups:
        reached = [segment for name, segment in assignment if name == group.name]
        for segment in range(search.base.num_segments):
            nearest = min(reached, key=lambda s: abs(s - segment))
            bits[group.name, segment] = assignment[group.name, nearest]
    return assembled(search.base, search.groups, bits)


def groups_by_name(search: Search) -> dict[str, Group]:
    """Name -> group."""
    return {group.name: group for group in search.groups}
