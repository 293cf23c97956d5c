"""`fit=16GB`: which settings fit a memory, from those that change least to those that change most; nothing is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf

from viditq.byte_numbers import num_bytes, rounded
from viditq.conf_folder import CONF
from viditq.engine.offload import DISK, OFFLOADS
from viditq.errors import UserError
from viditq.estimate import Estimate, Known, estimate
from viditq.estimate.memory import Peak
from viditq.estimate.probe import Probe
from viditq.estimate.work import DONE
from viditq.experiment import Experiment
from viditq.job import Job
from viditq.models.roles import FLOAT
from viditq.models.text_encoders import build_encoder, encoder_names
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.policy import Uniform
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.recipe import Recipe
from viditq.quant.text_encoder import text_encoder_plan
from viditq.stages.benchmark import weights_side_by_side

ENCODER_FORMATS = CONF / "quant" / "text_encoder"
BUDGETED = ("generate", "diagnose")  # stages whose peak grows with trainer.memory_budget


@dataclass(frozen=True)
class Candidate:
    """label: what it is. overrides: to type in addition. experiment: the run with them."""

    label: str
    overrides: tuple[str, ...]
    experiment: Experiment


@dataclass(frozen=True)
class Row:
    """stages: peaks of the run, with the interpreter. use: of `load_quantized` and a call; use_budget: its
    memory_budget, None = without. overrides: to type.
    """

    label: str
    overrides: tuple[str, ...]
    stages: Mapping[str, Peak]
    use: Peak
    use_budget: str | None = None

    def run(self) -> tuple[str, int]:
        """The stage that takes most of what is asked about, and how much."""
        taken = [(stage, asked(peak)) for stage, peak in self.stages.items()]
        return max(taken, key=lambda pair: pair[1], default=("", 0))


@dataclass(frozen=True)
class Fit:
    """limit: bytes there are, of the memory that computes: of a GPU (gpu) or of the machine. rows: by change."""

    name: str
    model: str
    batch_size: int
    limit: int
    gpu: bool
    rows: Sequence[Row]

    def first_run(self) -> Row | None:
        """The first setting whose run fits."""
        return next((row for row in self.rows if row.run()[1] <= self.limit), None)

    def first_use(self) -> Row | None:
        """The first whose result can be loaded and called."""
        return next((row for row in self.rows if asked(row.use) <= self.limit), None)


def asked(peak: Peak) -> int:
    """Bytes of the memory that the user asks about."""
    return peak.ram if peak.vram is None else peak.vram


def propose(job: Job, limit: int) -> Fit:
    """The candidates of a run with their peaks, from configurations alone."""
    e = job.experiment
    gpu = e.device.type != "cpu"
    known = _Estimates(job)
    rows = [_row(candidate, known, limit) for candidate in candidates(e, gpu)]
    return Fit(e.name, e.adapter.name, known.batch_size, limit, gpu, rows)


# Candidates -----------------------------------------------------------------------------------------------------------


def candidates(e: Experiment, gpu: bool) -> Iterator[Candidate]:
    """From least change to most: nothing quantized, the denoiser, the text encoders; then where weights lie."""
    whole = replace(e, offload=None)
    nothing = replace(whole, plan=QuantPlan((0.0, 1.0), {}, {}), encoder_plans={})
    yield Candidate("nothing is quantized", ("quant=none",), nothing)
    last = Candidate("", (), whole)
    for last in _widths(whole):
        yield last
    for bits in (8, 4):
        plans = _encoder_plans(e, bits)
        if plans and not e.encoder_plans:
            overrides = (*last.overrides, f"quant/text_encoder=w{bits}")
            label = f"{last.label}, text encoders in {bits} bits"
            yield Candidate(label, overrides, replace(last.experiment, encoder_plans=plans))
    for offload in OFFLOADS if gpu else (DISK,):
        overrides = (*last.overrides, f"trainer.offload={offload}")
        moved = Candidate(f"{last.label}, {PLACES[offload]}", overrides, replace(last.experiment, offload=offload))
        yield moved
    if e.batch_size > 1:
        overrides = (*overrides, "batch_size=1")
        yield Candidate(f"{moved.label}, one prompt at a time", overrides, replace(moved.experiment, batch_size=1))


PLACES = {DISK: "weights on disk", "model": "one model on the GPU", "sequential": "one layer on the GPU"}


def _widths(e: Experiment) -> Iterator[Candidate]:
    """The configured plan, and what `bits` makes of it: wider before, narrower after."""
    recipe, label = e.quant.recipe, "as configured"
    if isinstance(e.quant.policy, Uniform) and recipe.weight is not None:
        label = f"denoiser in {recipe.weight.bits} bits, {label}"
    configured = Candidate(label, (), e)
    if not isinstance(e.quant.policy, Uniform) or (recipe.weight is not None and recipe.weight.is_float):
        yield configured
    elif recipe.weight is None:
        for bits in (8, 4):
            spec = QuantSpec(bits, granularity="channel"), QuantSpec(8, granularity="token", dynamic=True)
            yield Candidate(f"denoiser W{bits}A8", (f"quant=w{bits}a8",), _planned(e, Recipe(*spec)))
    else:
        at = {bits: _at(e, bits) for bits in (8, 4)}
        yield from (at[bits] for bits in (8, 4) if bits > recipe.weight.bits)
        yield configured
        yield from (at[bits] for bits in (8, 4) if bits < recipe.weight.bits)


def _at(e: Experiment, bits: int) -> Candidate:
    recipe: Any = e.quant.recipe
    if recipe.activation is None:
        weight, activation, override = replace(recipe.weight, bits=bits), None, f"quant.weight.bits={bits}"
    else:
        weight, activation = replace(recipe.weight, bits=bits), replace(recipe.activation, bits=8)
        override = f"bits=w{bits}a8"
    wider = recipe.with_formats(weight, activation)
    return Candidate(f"denoiser in {bits} bits", (override,), _planned(e, wider))


def _planned(e: Experiment, recipe: Recipe) -> Experiment:
    kept = [name for name, role in e.roles.items() if role == FLOAT]
    return replace(e, plan=e.quant.policy.plan(recipe, [*e.roles], kept))


def _encoder_plans(e: Experiment, bits: int) -> dict[str, QuantPlan]:
    """Text encoder -> its plan at these bits; none where they cannot be quantized."""
    if e.data.ready_embeds:
        return {}
    try:
        names = encoder_names(e.adapter)
    except UserError:
        return {}
    spec: QuantSpec = instantiate(OmegaConf.load(ENCODER_FORMATS / f"w{bits}.yaml"))
    return {name: text_encoder_plan(build_encoder(e.adapter, name), spec, name) for name in names}


# Their peaks ----------------------------------------------------------------------------------------------------------


class _Estimates:
    """Estimates of candidates, of a run that has not begun; what they have in common is found once."""

    def __init__(self, job: Job) -> None:
        self._run_dir = replace(job.run_dir, path=job.run_dir.path / "fit")  # where nothing is done yet
        self._known = Known.of(job.experiment.adapter)
        self._probes: dict[int, Probe] = {}
        self.batch_size = min(job.experiment.batch_size, job.num_prompts)

    def of(self, e: Experiment) -> Estimate:
        """One candidate's."""
        fresh = Job(replace(e, cache_dir=self._run_dir.path), self._run_dir)
        found = estimate(fresh, "meta", self._known, self._probes.get(e.batch_size))
        self._probes[e.batch_size] = found.probe
        return found


def _row(candidate: Candidate, known: _Estimates, limit: int) -> Row:
    e, overrides = candidate.experiment, candidate.overrides
    if e.offload != DISK:
        found = known.of(e)
        return Row(candidate.label, overrides, _stages(found, e, limit), _with_base(found.use.whole, found.base))
    found = known.of(replace(e, memory_budget=1))  # the least that is possible
    stages, use = _stages(found, e, limit), _with_base(found.use.from_disk, found.base)
    room = limit - max((asked(peak) for stage, peak in stages.items() if stage in BUDGETED), default=0)
    budget, use_budget = _budget(found, room), _budget(found, limit - asked(use))
    more, use_more = (_bytes(given) - found.use.least_budget for given in (budget, use_budget))
    larger = {stage: _with_base(stages[stage], more) for stage in BUDGETED if stage in stages}
    overrides = (*overrides, f"trainer.memory_budget={budget}")
    return Row(candidate.label, overrides, stages | larger, _with_base(use, use_more), use_budget)


def _budget(found: Estimate, room: int) -> str:
    """The largest memory_budget for which there is room beside the least one, as it is typed."""
    least, most = found.use.least_budget, found.use.most_budget
    given = rounded(min(max(least + room, least), most))
    return given if _bytes(given) >= least else rounded(least, up=True)


def _bytes(given: str) -> int:
    found = num_bytes(given)
    assert found is not None
    return found


def _stages(found: Estimate, e: Experiment, limit: int) -> dict[str, Peak]:
    """Of the stages that do something; benchmark leaves itself out where its weights do not fit."""
    peaks = {stage: found.peaks.get(stage) for stage, work in found.works.items() if work.note != DONE}
    if weights_side_by_side(sum(found.parts[name][0] for name in found.denoisers), e.adapter) > limit:
        peaks.pop("benchmark", None)
    return {stage: _with_base(peak, found.base) for stage, peak in peaks.items() if peak is not None}


def _with_base(peak: Peak, base: int) -> Peak:
    return Peak(peak.ram + base, peak.vram)
