"""Stage `search` with quant/policy=treatments: the best plan for the budget, and what it was chosen from."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from viditq.errors import UserError
from viditq.files import atomic, is_whole, write_json
from viditq.job import Job
from viditq.quant.convert import shapes_of
from viditq.quant.search.allotment import SIZE, Treated, allotted, evenly, treated_plan, used
from viditq.quant.search.treatment_policy import TreatmentSearch
from viditq.quant.search.treatments import Treatment
from viditq.stages.calibrate import observe
from viditq.stages.search_result import average
from viditq.stages.treatment_table import TreatmentTable
from viditq.treated_parts import Room

TRIES = 5  # what files take beside tensors is known when there is a plan
POINTS = 9  # of the predicted curve
Costs = Mapping[str, Mapping[Treatment, float]]


def search_treatments(job: Job, policy: TreatmentSearch) -> str:
    """Find the plan; what is found of parts and finalists is kept in the cache, for other budgets too."""
    run_dir = job.run_dir
    if job.processes.first_does(lambda: is_whole(run_dir.treatments) and is_whole(run_dir.plan)):
        return f"already done ({run_dir.plan})"
    observe(job)
    with job.timed(run_dir.path, "search"):
        return _search(job, policy)


def _search(job: Job, policy: TreatmentSearch) -> str:
    e, budget = job.experiment, policy.parsed_budget
    parts = policy.parts(e.plan, e.roles, shapes_of(e.adapter.build_denoiser()))
    room, table = Room(e.adapter, policy, e.plan.edges, parts), TreatmentTable(job, policy, parts)
    found = table.found()
    costs = {name: one.costs for name, one in found.items()}
    finalists = {"by part": room.fitting(lambda size: allotted(parts, costs, budget, size))}
    alike = room.fitting(lambda size: evenly(parts, costs, budget, size))
    finalists |= {} if alike is None else {"alike": alike}
    plans = {how: treated_plan(e.plan.edges, parts, treated) for how, treated in finalists.items()}
    errors = dict(zip(plans, table.output_errors([*plans.values()]), strict=True))
    scores = {how: average(of, "geometric") for how, of in errors.items()}
    best = min(scores, key=lambda how: scores[how])

    def point(treated: Treated) -> dict[str, Any]:
        uses = used(parts, treated, budget)
        predicted = sum(costs[name][treatment] for name, treatment in treated.items())
        return {**uses, SIZE: room.bytes_of(treated), "predicted": predicted}

    def conclude() -> str:
        result = {
            "budget": dict(policy.budget),
            "used": point(finalists[best]),
            "chosen": best,
            "finalists": [
                {"how": how, **point(treated), "measured": scores[how], "parts": _names(treated)}
                for how, treated in finalists.items()
            ],
            "found": {
                name: {"anchor": one.anchor.name, "output": one.output, "own": {t.name: v for t, v in one.errors.items()}}
                for name, one in found.items()
            },
        }
        with atomic(job.run_dir.plan) as temporary:
            temporary.write_text(plans[best].to_json())
        write_json(job.run_dir.treatments, result)
        return f"{result['used'][SIZE] / 1e6:.2f} MB, weights {result['used']['weight_bits']:.2f} bits ({job.run_dir.plan})"

    return job.processes.first_does(conclude)


def _names(treated: Treated) -> dict[str, str]:
    return {name: treatment.name for name, treatment in treated.items()}
