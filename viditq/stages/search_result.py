"""From the scores of a sensitivity search to costs, and what is written of the plan that they lead to."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from viditq.engine.probing import OUTPUT, Scores
from viditq.errors import UserError
from viditq.files import atomic, write_json
from viditq.quant.search.allocate import Assignment, Search, cost_of, used
from viditq.quant.search.budget import Budget
from viditq.quant.search.candidates import Candidate
from viditq.quant.search.costs import completed, rank_correlation
from viditq.quant.search.policy import SensitivitySearch, found_plan, groups_by_name
from viditq.report.budget_curve import budget_curve_picture
from viditq.report.heat_map import heat_map_picture
from viditq.run_dir import RunDir

LADDER = 11  # budgets of the predicted curve
Measured = Mapping[Candidate, Scores]


@dataclass(frozen=True)
class Costs:
    """Candidate -> output error, and -> change of its role's metric (completed within the roles of that metric)."""

    output: Mapping[Candidate, float]
    metric: Mapping[Candidate, float]


def costs_of(policy: SensitivitySearch, space: Search, measured: Measured, proxy: Mapping[Candidate, float]) -> Costs:
    """What each candidate costs; those that were not measured follow their proxies."""
    groups = groups_by_name(space)
    by_output = completed({c: average(s[OUTPUT], policy.average) for c, s in measured.items()}, proxy)
    names = {c: policy.metric_of(groups[c.group].role) for c in proxy}
    by_metric: dict[Candidate, float] = {}
    for name in dict.fromkeys(names.values()):
        own = {c: average(s[name], policy.average) for c, s in measured.items() if names[c] == name}
        by_metric |= completed(own, {c: p for c, p in proxy.items() if names[c] == name})
    return Costs(by_output, by_metric)


def average(values: Sequence[float], how: str) -> float:
    """mean, or geometric: exp(mean(log)), for which one failing prompt counts less; an error of 0 counts as 1e-9."""
    if how == "mean":
        return fmean(values)
    return math.exp(fmean(math.log(max(value, 1e-9)) for value in values))


def allocated(policy: SensitivitySearch, space: Search, costs: Costs, budget: Budget) -> Assignment:
    """The bits within a budget."""
    return policy.allocated(space, costs.output, costs.metric, budget)


def point(policy: SensitivitySearch, space: Search, costs: Costs, assignment: Assignment) -> dict[str, Any]:
    """What an assignment uses, and its predicted output error."""
    return {**used(space, assignment, policy.parsed_budget), "predicted": cost_of(space, costs.output, assignment)}


def predicted_curve(policy: SensitivitySearch, space: Search, costs: Costs) -> list[dict[str, Any]]:
    """The best plans from the leanest choices to the widest, as the table foretells them: nothing is generated.

    Several limits move together; where they contradict each other (the fastest widths need not be the smallest), there
    is no plan and no point.
    """
    points = []
    for budget in policy.ladder(space, LADDER):
        with suppress(UserError):
            points.append(point(policy, space, costs, allocated(policy, space, costs, budget)))
    return points


def result_of(
    policy: SensitivitySearch,
    space: Search,
    proxy: Mapping[Candidate, float],
    measured: Measured,
    costs: Costs,
    assignment: Assignment,
) -> dict[str, Any]:
    """The content of search.json, but for the measured curve."""
    chosen = point(policy, space, costs, assignment)
    roles = dict.fromkeys(group.role for group in space.groups)
    return {
        "edges": list(space.base.edges),
        "budget": asdict(policy.parsed_budget),
        "used": {name: value for name, value in chosen.items() if name != "predicted"},
        "predicted": chosen["predicted"],
        "groups": [{"name": g.name, "block": g.block, "role": g.role} for g in space.groups],
        "metrics": {role: policy.metric_of(role) for role in roles},
        "candidates": [
            {
                **asdict(c),
                "proxy": proxy[c],
                "output": costs.output[c],
                "metric": costs.metric[c],
                "measured": c in measured,
            }
            for c in proxy
        ],
        "bits": [[*key, *bits] for key, bits in assignment.items()],
        "proxy_correlation": proxy_correlation(measured, proxy, policy.average),
        "predicted_curve": predicted_curve(policy, space, costs),
    }


def proxy_correlation(measured: Measured, proxy: Mapping[Candidate, float], how: str) -> dict[str, float | None]:
    """Side -> rank correlation of proxy and measured output error."""
    out = {}
    for side in dict.fromkeys(c.side for c in proxy):
        of_side = [c for c in measured if c.side == side]
        errors = [average(measured[c][OUTPUT], how) for c in of_side]
        out[side] = rank_correlation([proxy[c] for c in of_side], errors)
    return out


def write(run_dir: RunDir, space: Search, assignment: Assignment, result: Mapping[str, Any]) -> None:
    """plan.json, the pictures, and last search.json."""
    with atomic(run_dir.plan) as temporary:
        temporary.write_text(found_plan(space, assignment).to_json())
    heat_map_picture(result, run_dir.heat_map)
    budget_curve_picture(result, run_dir.budget_curve)
    write_json(run_dir.search, result)
