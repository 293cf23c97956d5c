"""Stage `search`: with quant/policy=sensitivity, what each part costs, and the plan that follows from it."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from hydra.utils import instantiate
from torch import nn

from viditq.engine.probing import OUTPUT, Probe, Probing, ProxyPass, Scores
from viditq.engine.sampling import CALIBRATION_OFFSET, batches_of, run_batches
from viditq.files import atomic, is_whole, read_json, write_json
from viditq.job import Job
from viditq.quant.allocate import Assignment, cost_of, used
from viditq.quant.candidates import SIDES, Candidate, candidate_plan, candidates_of
from viditq.quant.convert import linear_names
from viditq.quant.observers import CalibrationStats
from viditq.quant.plan import QuantPlan
from viditq.quant.search import SensitivitySearch, found_plan, groups_by_name
from viditq.quant.step_shares import step_shares
from viditq.quant.table import completed, rank_correlation, to_measure
from viditq.report.budget_curve import budget_curve_picture
from viditq.report.heat_map import heat_map_picture
from viditq.run_dir import Entry, fingerprint
from viditq.stages.calibrate import observe

PROXY_PROMPTS = 2  # that the one-step proxy looks at
Measured = dict[Candidate, Scores]


def search(job: Job) -> str:
    """Find the plan within the budget; every candidate's scores are kept in the cache, for other budgets too."""
    policy = job.experiment.quant.policy
    if not isinstance(policy, SensitivitySearch):
        return "not needed: the policy names the bits"
    run_dir = job.run_dir
    if job.processes.first_does(lambda: is_whole(run_dir.search) and is_whole(run_dir.plan)):
        return f"already done ({run_dir.plan})"
    observe(job)
    with job.timed(run_dir.path, "search"):
        return _Searching(job, policy).run()


class _Searching:
    """One search: proxies, measured candidates, allocation, and what is written of them."""

    def __init__(self, job: Job, policy: SensitivitySearch) -> None:
        self.job, self.policy = job, policy
        e = job.experiment
        denoiser = e.adapter.build_denoiser()
        linears = {name: m for name, m in denoiser.named_modules() if isinstance(m, nn.Linear)}
        shapes = {name: (m.out_features, m.in_features) for name, m in linears.items()}
        stats = CalibrationStats.load(job.stats_file)
        shares = step_shares(stats, e.plan.edges)
        self.space = policy.search(e.plan, e.adapter.linear_roles(linear_names(denoiser)), shapes, shares)
        self.groups = groups_by_name(self.space)
        self.candidates = candidates_of(self.space.groups, e.plan.num_segments, self.space.choices)
        self.prompts = e.data.calibration_prompts[: policy.num_prompts]
        self.table, self.proxy = table_entry(job, policy), proxy_entry(job)

    def run(self) -> str:
        """Everything; returns the line that says what was done."""
        proxy = self._proxies()
        wanted = to_measure(proxy, self.policy.measure, self.policy.prune)
        made = self._measure(wanted)
        measured = {c: read_scores(self._file(c)) for c in self.candidates if is_whole(self._file(c))}
        if self.policy.measure == "pruned":
            measured = {c: scores for c, scores in measured.items() if c in set(wanted)}
        if self.policy.measure == "proxy":
            measured = {}
        costs = self._costs(measured, proxy)
        assignment = self.policy.allocated(self.space, *costs, self.policy.parsed_budget)
        curve = self._curve(costs)
        self.job.processes.first_does(lambda: self._write(proxy, measured, costs, assignment, curve))
        numbers = used(self.space, assignment, self.policy.parsed_budget)
        return (
            f"{made} of {len(self.candidates)} candidates generated, {len(measured) - made} found; weights "
            f"{numbers['weight_bits']:.2f} bits, activations {numbers['activation_bits']:.2f} ({self.job.run_dir.plan})"
        )

    # Measuring -------------------------------------------------------------------------------------------------------

    def _file(self, candidate: Candidate) -> Path:
        return self.table.path / f"{candidate.name}.json"

    def _proxies(self) -> dict[Candidate, float]:
        """Errors on calibration rows, cached; made on the first process."""
        file = self.proxy.path / "proxies.json"

        def complete() -> bool:
            return is_whole(file) and all(c.name in read_json(file) for c in self.candidates)

        def keep(found: Mapping[Candidate, float]) -> None:
            known = read_json(file) if is_whole(file) else {}
            write_json(file, known | {c.name: value for c, value in found.items()})

        with self.job.holding(self.proxy):
            if not self.job.processes.first_does(complete):
                self._make_proxies(keep)
            known = self.job.processes.first_does(lambda: read_json(file))
        return {c: known[c.name] for c in self.candidates}

    def _make_proxies(self, sink: Callable[[Mapping[Candidate, float]], None]) -> None:
        job, e = self.job, self.job.experiment
        module = ProxyPass(
            *(e.adapter, e.adapter.load(), job.load_embeds(self.prompts), e.seed),
            base=e.plan,
            stats=CalibrationStats.load(job.stats_file),
            groups=self.groups,
            candidates=self.candidates,
            backend=e.backend,
            sink=sink,
        )
        batch = [(i, CALIBRATION_OFFSET + i) for i in range(min(PROXY_PROMPTS, len(self.prompts)))]
        run_batches(e.make_trainer(), module, job.processes.share([batch]))
        job.processes.wait()

    def _measure(self, wanted: Sequence[Candidate]) -> int:
        """Generate and score what is not in the table yet, each process its share."""
        with self.job.holding(self.table):
            missing = self.job.processes.first_does(lambda: [c for c in wanted if not is_whole(self._file(c))])
            edges = self.job.experiment.plan.edges
            self._probe([self._probe_of(c, edges[c.segment + 1]) for c in missing])
        return len(missing)

    def _probe_of(self, candidate: Candidate, first_level: float) -> Probe:
        group = self.groups[candidate.group]

        def sink(scores: Scores) -> None:
            write_json(self._file(candidate), {**asdict(candidate), "scores": scores})

        base = self.job.experiment.plan
        metric = self.policy.metric_of(group.role)
        return Probe(lambda: candidate_plan(base, group, candidate), first_level, [metric], sink)

    def _probe(self, probes: Sequence[Probe]) -> None:
        if not probes:
            return
        job, e = self.job, self.job.experiment
        metrics = {name: instantiate(node) for name, node in self.policy.metrics.items()}
        module = Probing(
            *(e.adapter, e.adapter.load(), job.load_embeds(self.prompts), e.seed),
            prompts=self.prompts,
            noise_indices=[CALIBRATION_OFFSET + i for i in range(len(self.prompts))],
            batches=batches_of(len(self.prompts), e.batch_size),
            metrics=metrics,
            base=e.plan,
            stats=CalibrationStats.load(job.stats_file),
            backend=e.backend,
        )
        run_batches(e.make_trainer(), module, job.processes.share(probes))
        job.processes.wait()

    def _curve(self, costs: tuple[dict[Candidate, float], dict[Candidate, float]]) -> list[dict[str, Any]]:
        """Plans at other budgets: bits, predicted and measured output error."""
        points = []
        for budget in self.policy.budgets(self.space):
            assignment = self.policy.allocated(self.space, *costs, budget)
            plan = found_plan(self.space, assignment)
            points.append((plan, used(self.space, assignment, budget), cost_of(self.space, costs[0], assignment)))
        if not points:
            return []
        files = [self.table.path / f"plan-{fingerprint({'plan': plan.to_json()})}.json" for plan, *_ in points]
        with self.job.holding(self.table):
            absent = self.job.processes.first_does(lambda: [i for i, f in enumerate(files) if not is_whole(f)])
            self._probe([_plan_probe(points[i][0], files[i]) for i in absent])
        return [
            {**bits, "predicted": predicted, "measured": self._average(read_scores(file)[OUTPUT])}
            for (_, bits, predicted), file in zip(points, files, strict=True)
        ]

    # Deciding --------------------------------------------------------------------------------------------------------

    def _average(self, values: Sequence[float]) -> float:
        return average(values, self.policy.average)

    def _costs(
        self, measured: Measured, proxy: Mapping[Candidate, float]
    ) -> tuple[dict[Candidate, float], dict[Candidate, float]]:
        """Candidate -> output error, and -> change of its role's metric scaled to output error within the role."""
        by_output = completed({c: self._average(s[OUTPUT]) for c, s in measured.items()}, proxy)
        names = {c: self.policy.metric_of(self.groups[c.group].role) for c in self.candidates}
        by_metric: dict[Candidate, float] = {}
        for name in dict.fromkeys(names.values()):
            own = {c: fmean(s[name]) for c, s in measured.items() if names[c] == name}
            by_metric |= completed(own, {c: p for c, p in proxy.items() if names[c] == name})
        return by_output, by_metric

    # Writing ---------------------------------------------------------------------------------------------------------

    def _write(
        self,
        proxy: Mapping[Candidate, float],
        measured: Measured,
        costs: tuple[dict[Candidate, float], dict[Candidate, float]],
        assignment: Assignment,
        curve: list[dict[str, Any]],
    ) -> None:
        run_dir, plan = self.job.run_dir, found_plan(self.space, assignment)
        result = {
            "edges": list(plan.edges),
            "prompts": len(self.prompts),
            "budget": asdict(self.policy.parsed_budget),
            "used": used(self.space, assignment, self.policy.parsed_budget),
            "predicted": cost_of(self.space, costs[0], assignment),
            "groups": [{"name": g.name, "block": g.block, "role": g.role} for g in self.space.groups],
            "metrics": {role: self.policy.metric_of(role) for role in dict.fromkeys(g.role for g in self.space.groups)},
            "candidates": [
                {
                    **asdict(c),
                    "proxy": proxy[c],
                    "output": costs[0][c],
                    "metric": costs[1][c],
                    "measured": c in measured,
                }
                for c in self.candidates
            ],
            "bits": [[*key, *bits] for key, bits in assignment.items()],
            "proxy_correlation": proxy_correlation(measured, proxy, self.policy.average),
            "curve": curve,
        }
        with atomic(run_dir.plan) as temporary:
            temporary.write_text(plan.to_json())
        heat_map_picture(result, run_dir.heat_map)
        if curve:
            budget_curve_picture(curve, run_dir.search.with_name("budget_curve.png"))
        write_json(run_dir.search, result)


def formats(plan: QuantPlan) -> Any:
    """Where which formats and transforms apply, whatever their bits, as plain values."""
    schemes = [scheme.to_dict() for scheme in plan.schemes.values()]
    for side in (scheme[name] for scheme in schemes for name in SIDES if scheme[name]):
        del side["bits"]
    places = {name: i for i, name in enumerate(plan.schemes)}
    layers = {layer: [n and places[n] for n in names] for layer, names in plan.layers.items()}
    return json.loads(json.dumps({"edges": plan.edges, "schemes": schemes, "layers": layers}))


def _key(job: Job, num_prompts: int) -> dict[str, Any]:
    """What results depend on, whatever the budget and the choices."""
    e = job.experiment
    prompts = e.data.calibration_prompts[:num_prompts]
    of_model = {"stats": job.stats.path.name, "formats": formats(e.plan), "roles": dict(e.adapter.roles)}
    return {**of_model, "seed": e.seed, "prompts": prompts}


def proxy_entry(job: Job) -> Entry:
    """The proxies of candidates."""
    return Entry(job.experiment.cache_dir / "proxies", _key(job, PROXY_PROMPTS))


def table_entry(job: Job, policy: SensitivitySearch) -> Entry:
    """The scores of candidates."""
    key = {**_key(job, policy.num_prompts), "batch_size": job.experiment.batch_size, "metrics": dict(policy.metrics)}
    return Entry(job.experiment.cache_dir / "sensitivity", key)


def read_scores(file: Path) -> Scores:
    """What a candidate's file holds."""
    return read_json(file)["scores"]


def average(values: Sequence[float], how: str) -> float:
    """mean, or geometric: exp(mean(log)), for which one failing prompt counts less; an error of 0 counts as 1e-9."""
    if how == "mean":
        return fmean(values)
    return math.exp(fmean(math.log(max(value, 1e-9)) for value in values))


def proxy_correlation(measured: Measured, proxy: Mapping[Candidate, float], how: str) -> dict[str, float | None]:
    """Side -> rank correlation of proxy and measured output error."""
    out = {}
    for side in dict.fromkeys(c.side for c in proxy):
        of_side = [c for c in measured if c.side == side]
        errors = [average(measured[c][OUTPUT], how) for c in of_side]
        out[side] = rank_correlation([proxy[c] for c in of_side], errors)
    return out


def _plan_probe(plan: QuantPlan, file: Path) -> Probe:
    return Probe(lambda: plan, 1.0, [], lambda scores: write_json(file, {"scores": scores}))
