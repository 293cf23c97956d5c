"""The search stage's work: at most so many candidates are generated, each from its segment's first step on."""

from __future__ import annotations

from viditq.engine.sampling import batches_of
from viditq.estimate.probe import Probe
from viditq.estimate.work import DONE, Counter, Work
from viditq.files import is_whole
from viditq.job import Job
from viditq.models.schedule import noise_levels
from viditq.quant.execution.model_linears import shapes_of
from viditq.quant.search.allocate import Search
from viditq.quant.search.candidates import candidates_of
from viditq.quant.search.costs import to_measure
from viditq.quant.search.policy import SensitivitySearch
from viditq.quant.search.treatment_policy import TreatmentSearch
from viditq.stages.search_table import PROXY_PROMPTS, known_errors, table_entry
from viditq.stages.treatments import HOW


def searching(job: Job, counter: Counter, seen: Probe, quantized: Probe) -> Work:
    """Proxies: float samples, and a forward of every candidate; then the candidates that may have to be generated.

    Pruning is known only when the proxies are: without them every candidate that it may leave is counted.
    """
    policy, e = job.experiment.quant.policy, job.experiment
    if isinstance(policy, TreatmentSearch):
        return _treating(job, policy, counter, seen, quantized)
    if not isinstance(policy, SensitivitySearch):
        return Work(note=DONE)
    if is_whole(job.run_dir.search) and is_whole(job.run_dir.plan):
        return Work(note=DONE)
    space = _space(job, policy)
    candidates = candidates_of(space.cells, space.choices)
    wanted = to_measure(dict.fromkeys(candidates, 1.0), policy.measure, 0.0, fixed=space.fixed)
    table = table_entry(job, policy).path
    missing = [c for c in wanted if not is_whole(table / f"{c.name}.json")]
    prompts = e.data.calibration_prompts[: policy.num_prompts]
    batches = batches_of(len(prompts), e.adapter.calibration_batch_size)
    one = counter.work(quantized, prompts, batches)
    levels = noise_levels(e.adapter) if missing else None
    share = sum(_share(levels, e.plan.edges[c.segment + 1]) for c in missing) + len(policy.curve)
    exact = counter.work(seen, prompts, batches if missing or policy.curve else [])
    forwards, seconds = exact.forwards + round(one.forwards * share), None
    if one.seconds is not None and exact.seconds is not None:
        seconds = exact.seconds + share * (one.seconds - counter.load_seconds)
    if known_errors(job, candidates).missing(candidates):
        proxy = counter.work(seen, prompts, [[*range(min(PROXY_PROMPTS, len(prompts)))]], decode=False)
        forwards += proxy.forwards + len(candidates)
        if seconds is not None and proxy.seconds is not None and quantized.forward_seconds is not None:
            seconds += proxy.seconds + len(candidates) * quantized.forward_seconds
    samples = exact.samples + len(prompts) * (len(missing) + len(policy.curve))
    return Work(samples, 0, forwards, seconds, f"at most, {len(missing)} candidates")


def _treating(job: Job, policy: TreatmentSearch, counter: Counter, seen: Probe, quantized: Probe) -> Work:
    """A few prompts in float, a few steps for each part, and the finalists; fitting treatments is not timed."""
    e = job.experiment
    if is_whole(job.run_dir.treatments) and is_whole(job.run_dir.plan):
        return Work(note=DONE)
    parts = policy.parts(e.plan, e.roles, shapes_of(e.adapter.build_denoiser()))
    few = [*range(min(policy.step_prompts, policy.held_out))]
    exact = counter.work(seen, e.held_out_prompts, [few], decode=False)
    batches = batches_of(policy.held_out, e.adapter.calibration_batch_size)
    finalists = counter.work(quantized, e.held_out_prompts, batches * len(HOW))
    forwards = exact.forwards + finalists.forwards + policy.num_steps * len(parts)
    return Work(exact.samples + finalists.samples, 0, forwards, None, f"{len(parts)} parts; fits are not timed")


def _space(job: Job, policy: SensitivitySearch) -> Search:
    e = job.experiment
    equal = [1 / e.plan.num_segments] * e.plan.num_segments  # which denoiser runs where is known when it has been run
    shapes, shares = shapes_of(e.adapter.build_denoiser()), dict.fromkeys(e.plan.layers, equal)
    return policy.search(e.plan, e.roles, shapes, shares, e.adapter.left_in_float_bytes())


def _share(levels: list[float] | None, top: float) -> float:
    """Of the steps: those before a candidate's segment, which reaches up to `top`, are replayed."""
    return 1.0 if not levels else sum(level <= top for level in levels) / len(levels)
