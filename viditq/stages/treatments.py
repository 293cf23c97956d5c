"""Stage `search` with quant/policy=treatments: the best plan for the budget, and what it was chosen from."""

from collections.abc import Mapping, Sequence
from functools import partial
from math import inf
from typing import Any

import torch

from viditq.engine.treating import Found
from viditq.files import atomic, write_json
from viditq.job import Job
from viditq.metrics.bootstrap import bootstrap_interval
from viditq.quant.execution.model_linears import shapes_of
from viditq.quant.search.allotment import SIZE, Costs, Part, Treated, allotted, cost_of, evenly, treated_plan, used
from viditq.quant.search.treatment_policy import SizedBudget, TreatmentSearch
from viditq.report.treatments_picture import treatments_picture
from viditq.stages.search_result import average
from viditq.stages.treatment_table import TreatmentTable
from viditq.treated_parts import Room

POINTS = 9  # of the predicted curve
HOW = {"by part": allotted, "alike": evenly}  # finalists
Point = dict[str, Any]


def search_treatments(job: Job, policy: TreatmentSearch) -> str:
    """Find the plan; what is found of parts and finalists is kept in the cache, for other budgets too."""
    e = job.experiment
    parts = policy.parts(e.plan, e.roles, shapes_of(e.adapter.build_denoiser()))
    room, table = Room(e.adapter, policy, e.plan.edges, parts), TreatmentTable(job, policy, parts)
    found = table.found()
    costs = {name: one.costs for name, one in found.items()}
    finalists = _finalists(policy, parts, costs, room)
    plans = {how: treated_plan(e.plan.edges, parts, treated) for how, treated in finalists.items()}
    errors = dict(zip(plans, table.output_errors([*plans.values()]), strict=True))
    measured = {how: average(of, "geometric") for how, of in errors.items()}
    best = chosen(errors)

    def conclude() -> str:
        points = {how: _point(policy, parts, costs, room, treated) for how, treated in finalists.items()}
        result = {
            "budget": dict(policy.budget),
            "chosen": best,
            "prompts": len(table.prompts),
            "finalists": [
                {"how": how, **point, "measured": measured[how], "parts": _names(finalists[how])}
                for how, point in points.items()
            ],
            "curve": _curve(policy, parts, costs, room),
            "found": _told(found),
        }
        with atomic(job.run_dir.plan) as temporary:
            temporary.write_text(plans[best].to_json())
        treatments_picture(result, job.run_dir.treatments_picture)
        write_json(job.run_dir.treatments, result)
        size, bits = points[best][SIZE] / 1e6, points[best]["weight_bits"]
        return f"{best}: {size:.2f} MB, weights {bits:.2f} bits ({job.run_dir.plan})"

    return job.processes.first_does(conclude)


def chosen(errors: Mapping[str, Sequence[float]]) -> str:
    """The finalist to take, of those in HOW's order: a later one only where it is certainly better (paired, 95 %).

    errors: how found -> mean square error of each held-out prompt. Rounded activations make a prompt's error anew
    at the slightest change, so that of two finalists the lesser mean of 8 prompts is often the worse plan: what their
    parts' errors predict is worth more, unless the prompts contradict it clearly.
    """
    first, *others = (how for how in HOW if how in errors)
    for how in others:
        logs = torch.tensor([errors[how], errors[first]], dtype=torch.float64).clamp(min=1e-9).log()
        interval = bootstrap_interval(logs[0] - logs[1])
        if interval is not None and interval[1] < 0:
            first = how
    return first


def _finalists(policy: TreatmentSearch, parts: list[Part], costs: Costs, room: Room) -> dict[str, Treated]:
    """How each was found -> what it does to each part; one that gives all parts the same may not be there."""
    tried = {how: room.fitting(partial(find, parts, costs, policy.parsed_budget)) for how, find in HOW.items()}
    return {how: treated for how, treated in tried.items() if treated is not None}


def _point(policy: TreatmentSearch, parts: list[Part], costs: Costs, room: Room, treated: Treated) -> Point:
    """What treatments use, and their summed cost."""
    uses = used(parts, treated, policy.parsed_budget)
    return {**uses, SIZE: room.bytes_of(treated), "predicted": cost_of(costs, treated)}


def _curve(policy: TreatmentSearch, parts: list[Part], costs: Costs, room: Room) -> list[Point]:
    """The best plans from the fewest bytes to the most, whatever else is limited: nothing is generated."""
    anything = SizedBudget(size=inf)
    sizes = [{t: part.stored_bytes(t) for t in costs[part.name]} for part in parts]
    least, most = (sum(end(of.values()) for of in sizes) for end in (min, max))
    places = [least + (most - least) * i / (POINTS - 1) for i in range(POINTS)]
    return [_point(policy, parts, costs, room, allotted(parts, costs, anything, place)) for place in places]


def _names(treated: Treated) -> dict[str, str]:
    return {name: treatment.name for name, treatment in treated.items()}


def _told(found: Mapping[str, Found]) -> dict[str, Any]:
    return {
        name: {
            "anchor": one.anchor.name,
            "output": one.output,
            "own": {treatment.name: error for treatment, error in one.errors.items()},
        }
        for name, one in found.items()
    }
