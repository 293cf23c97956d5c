"""The table of a sensitivity search on disk: proxies, the scores of candidates and of whole plans, and their making."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from viditq.engine.probing import OUTPUT, Probe, Probing, ProxyPass, Scores
from viditq.engine.sampling import CALIBRATION_OFFSET, batches_of, run_batches
from viditq.errors import UserError
from viditq.experiment import Experiment
from viditq.files import is_whole, read_json, write_json
from viditq.job import Job
from viditq.quant.calibration.statistics import CalibrationStats
from viditq.quant.description.plan import QuantPlan
from viditq.quant.search.allocate import Search
from viditq.quant.search.candidates import SIDES, Candidate, candidate_plan
from viditq.quant.search.policy import SensitivitySearch, groups_by_name
from viditq.quant.search.proxy import ProxyErrors
from viditq.run_dir import Entry, fingerprint

PROXY_PROMPTS = 2  # that the one-step proxy looks at
PROXIES = "errors.json"


class SearchTable:
    """What is known of the candidates of one search; what is not yet is made by all processes together."""

    def __init__(
        self,
        job: Job,
        policy: SensitivitySearch,
        space: Search,
        candidates: Sequence[Candidate],
        stats: CalibrationStats,
    ) -> None:
        self.job, self.policy, self.candidates, self.stats = job, policy, candidates, stats
        self.groups = groups_by_name(space)
        self.prompts = job.experiment.data.calibration_prompts[: policy.num_prompts]
        self.entry, self.proxy_entry = table_entry(job, policy), proxy_entry(job)

    def file(self, candidate: Candidate) -> Path:
        """Where a candidate's scores are kept."""
        return self.entry.path / f"{candidate.name}.json"

    def scores(self, candidates: Sequence[Candidate]) -> dict[Candidate, Scores]:
        """Of candidates that have been generated."""
        return {c: read_scores(self.file(c)) for c in candidates}

    def proxies(self) -> dict[Candidate, float]:
        """Of every candidate; what they are made of is cached, for other choices too, and made on the first process."""
        file = self.proxy_entry.path / PROXIES

        def known() -> ProxyErrors:
            return known_errors(self.job, self.candidates)

        def keep(found: ProxyErrors) -> None:
            values = read_json(file) if is_whole(file) else {}
            kinds = {f.name: {c.name: error for c, error in getattr(found, f.name).items()} for f in fields(found)}
            write_json(file, {name: values.get(name, {}) | kind for name, kind in kinds.items()})

        with self.job.holding(self.proxy_entry):
            if self.job.processes.first_does(lambda: known().missing(self.candidates)):
                self._make_proxies(keep)
            return self.job.processes.first_does(lambda: known().proxies(self.candidates))

    def measure(self, wanted: Sequence[Candidate]) -> int:
        """Generate and score what is not in the table yet, each process its share; returns how many."""
        with self.job.holding(self.entry):
            missing = self.job.processes.first_does(lambda: [c for c in wanted if not is_whole(self.file(c))])
            edges = self.job.experiment.plan.edges
            self._probe([self._probe_of(c, edges[c.segment + 1]) for c in missing])
        return len(missing)

    def output_errors(self, plans: Sequence[QuantPlan]) -> list[list[float]]:
        """Of each whole plan, the output error of every prompt."""
        if not plans:
            return []
        files = [self.entry.path / f"plan-{fingerprint({'plan': plan.to_json()})}.json" for plan in plans]
        with self.job.holding(self.entry):
            absent = self.job.processes.first_does(lambda: [i for i, f in enumerate(files) if not is_whole(f)])
            self._probe([_plan_probe(plans[i], files[i]) for i in absent])
        return [read_scores(file)[OUTPUT] for file in files]

    def _make_proxies(self, sink: Callable[[ProxyErrors], None]) -> None:
        job, e = self.job, self.job.experiment
        module = ProxyPass(
            *(e.adapter, job.load_float(), job.load_embeds(self.prompts), e.seed),
            base=e.plan,
            stats=self.stats,
            groups=self.groups,
            candidates=self.candidates,
            backend=e.backend,
            sink=sink,
        )
        batch = [(i, CALIBRATION_OFFSET + i) for i in range(min(PROXY_PROMPTS, len(self.prompts)))]
        run_batches(e.make_trainer(), module, job.processes.share([batch]))
        job.processes.wait()

    def _probe_of(self, candidate: Candidate, first_level: float) -> Probe:
        group = self.groups[candidate.group]

        def sink(scores: Scores) -> None:
            write_json(self.file(candidate), {**asdict(candidate), "scores": scores})

        base = self.job.experiment.plan
        metric = self.policy.metric_of(group.role)
        return Probe(lambda: candidate_plan(base, group, candidate), first_level, [metric], sink)

    def _probe(self, probes: Sequence[Probe]) -> None:
        if not probes:
            return
        job, e = self.job, self.job.experiment
        metrics = search_metrics(e, self.policy)
        module = Probing(
            *(e.adapter, job.load_float(), job.load_embeds(self.prompts), e.seed),
            prompts=self.prompts,
            noise_indices=[CALIBRATION_OFFSET + i for i in range(len(self.prompts))],
            batches=batches_of(len(self.prompts), e.adapter.calibration_batch_size),
            metrics=metrics,
            base=e.plan,
            stats=self.stats,
            backend=e.backend,
        )
        run_batches(e.make_trainer(), module, job.processes.share(probes))
        job.processes.wait()


def search_metrics(experiment: Experiment, policy: SensitivitySearch) -> dict[str, Any]:
    """Entry of quant.policy.metrics -> the metric, of those that a role of the plan is governed by.

    Raises UserError for one without a score per prompt, and for one that listens: probes are frames alone.
    """
    names = dict.fromkeys(policy.metric_of(experiment.roles[layer]) for layer in experiment.plan.layers)
    metrics = {name: instantiate(policy.metrics[name]) for name in names}
    for name, metric in metrics.items():
        if not hasattr(metric, "scores"):
            raise UserError(f"quant.policy.metrics.{name} has no score per prompt; choose one that has, such as ssim.")
        if getattr(metric, "reads_sound", False):
            raise UserError(f"quant.policy.metrics.{name} compares sound, and a search frames alone; choose ssim, say.")
    return metrics


def _plan_probe(plan: QuantPlan, file: Path) -> Probe:
    return Probe(lambda: plan, 1.0, [], lambda scores: write_json(file, {"scores": scores}))


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


def known_errors(job: Job, candidates: Sequence[Candidate]) -> ProxyErrors:
    """What the cache holds of what the proxies of these candidates are made of."""
    file = proxy_entry(job).path / PROXIES
    values = read_json(file) if is_whole(file) else {}
    kinds = (values.get(f.name, {}) for f in fields(ProxyErrors))
    return ProxyErrors(*({c: kind[c.name] for c in candidates if c.name in kind} for kind in kinds))


def table_entry(job: Job, policy: SensitivitySearch) -> Entry:
    """The scores of candidates."""
    batch_size = job.experiment.adapter.calibration_batch_size
    key = {**_key(job, policy.num_prompts), "batch_size": batch_size, "metrics": dict(policy.metrics)}
    return Entry(job.experiment.cache_dir / "sensitivity", key)


def read_scores(file: Path) -> Scores:
    """What a candidate's file holds."""
    return read_json(file)["scores"]
