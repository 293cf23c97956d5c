"""Stage `search`: what each part costs, and the plan that follows from it (quant/policy=sensitivity or treatments)."""

from functools import partial
from typing import Any

from viditq.files import is_whole
from viditq.job import Job
from viditq.quant.calibration.statistics import CalibrationStats
from viditq.quant.calibration.step_shares import step_shares
from viditq.quant.execution.model_linears import linear_names, shapes_of
from viditq.quant.search.allocate import Search
from viditq.quant.search.candidates import SIDES, candidates_of
from viditq.quant.search.costs import to_measure
from viditq.quant.search.policy import SensitivitySearch, found_plan
from viditq.quant.search.treatment_policy import TreatmentSearch
from viditq.stages.calibrate import observe
from viditq.stages.external import skipped
from viditq.stages.search_result import Costs, allocated, average, costs_of, point, result_of, write
from viditq.stages.search_table import SearchTable
from viditq.stages.treatments import search_treatments


def search(job: Job) -> str:
    """Find the plan within the budget; every candidate's scores are kept in the cache, for other budgets too."""
    if why := skipped(job, "search"):
        return why
    policy, run_dir = job.experiment.quant.policy, job.run_dir
    if isinstance(policy, TreatmentSearch):
        record, work = run_dir.treatments, partial(search_treatments, job, policy)
    elif isinstance(policy, SensitivitySearch):
        record, work = run_dir.search, partial(_search, job, policy)
    else:
        return "not needed: the policy names the bits"
    if job.processes.first_does(lambda: is_whole(record) and is_whole(run_dir.plan)):
        return f"already done ({run_dir.plan})"
    observe(job)
    with job.timed(run_dir.path, "search"):
        return work()


def _search(job: Job, policy: SensitivitySearch) -> str:
    stats = CalibrationStats.load(job.stats_file)
    space = space_of(job, policy, stats)
    _tell(job, policy, space)
    candidates = candidates_of(space.cells, space.choices)
    nothing = dict.fromkeys(candidates, 0.0)
    policy.allocated(space, nothing, nothing, policy.parsed_budget)  # limits that contradict each other end here
    table = SearchTable(job, policy, space, candidates, stats)
    proxy = table.proxies()
    wanted = to_measure(proxy, policy.measure, policy.prune, policy.rivals(space), space.fixed)
    made = table.measure(wanted)
    measured = table.scores(wanted)
    costs = costs_of(policy, space, measured, proxy)
    assignment = allocated(policy, space, costs, policy.parsed_budget)
    curve = _curve(policy, space, costs, table)

    def conclude() -> str:
        result = result_of(policy, space, proxy, measured, costs, assignment)
        write(job.run_dir, space, assignment, {**result, "prompts": len(table.prompts), "curve": curve})
        bits = (f"{side}s {result['used'][f'{side}_bits']:.2f} bits" for side in ("weight", "activation"))
        return ", ".join(bits)

    bits = job.processes.first_does(conclude)
    found = len(measured) - made
    return f"{made} of {len(candidates)} candidates generated, {found} found; {bits} ({job.run_dir.plan})"


def _tell(job: Job, policy: SensitivitySearch, space: Search) -> None:
    """Which settings have less to work on than they ask for."""
    if not job.processes.first:
        return
    count = len(job.experiment.data.calibration_prompts)
    if policy.num_prompts > count:
        job.say(f"      num_prompts={policy.num_prompts}, but there are {count} calibration prompts: all are used")
    for side in SIDES:
        if side not in space.choices:
            job.say(f"      {side}s stay in float, as the recipe says: {side}_choices are not used")


def space_of(job: Job, policy: SensitivitySearch, stats: CalibrationStats) -> Search:
    """What there is to choose from in this job's model."""
    e = job.experiment
    denoiser = e.adapter.build_denoiser()
    roles = e.adapter.linear_roles(linear_names(denoiser))
    shares = step_shares(stats, e.plan.edges)
    return policy.search(e.plan, roles, shapes_of(denoiser), shares, e.adapter.left_in_float_bytes())


def _curve(policy: SensitivitySearch, space: Search, costs: Costs, table: SearchTable) -> list[dict[str, Any]]:
    """Plans at other budgets: bits, predicted and measured output error."""
    found = [allocated(policy, space, costs, budget) for budget in policy.budgets(space, policy.curve)]
    errors = table.output_errors([found_plan(space, assignment) for assignment in found])
    return [
        {**point(policy, space, costs, assignment), "measured": average(values, policy.average)}
        for assignment, values in zip(found, errors, strict=True)
    ]
