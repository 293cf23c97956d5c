"""Precision by denoising step, as serving programs agree on it (schema 1, `first_last_n`): the first and last steps of
the loop take their activations in 16 bits; the weights are the same in all steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from viditq.errors import UserError
from viditq.export.float_weights import FloatWeights
from viditq.export.part import Again
from viditq.export.refusal import Refusal, raise_refused
from viditq.export.requantize import quantized_again
from viditq.models.adapter import ModelAdapter
from viditq.models.schedulers import make_scheduler
from viditq.models.timestep_scale import levels_of
from viditq.models.trial import TrialError, try_out
from viditq.quant.calibration.noise_level import interval_of
from viditq.quant.description.plan import QuantPlan
from viditq.quant.methods.quantizer import dequantize_weight

NEAREST = "a plan whose first and last ranges of noise levels have the same weights and activation=null"


@dataclass(frozen=True)
class Core:
    """The segments first .. last in which any layer quantizes activations, or all where none does.

    plan: of them. others: the segments outside.
    """

    first: int
    last: int
    plan: QuantPlan
    others: tuple[int, ...]


def core_of(plan: QuantPlan) -> Core:
    """What is left of a plan without the ranges at either end that leave activations in float."""

    def quantizes(segment: int) -> bool:
        schemes = [plan.scheme(layer, segment) for layer in plan.layers]
        return any(scheme is not None and scheme.activation is not None for scheme in schemes)

    found = [i for i in range(plan.num_segments) if quantizes(i)] or [0, plan.num_segments - 1]
    first, last = found[0], found[-1]
    edges = (0.0, *plan.edges[first + 1 : last + 1], 1.0)
    layers = {layer: names[first : last + 1] for layer, names in plan.layers.items()}
    others = tuple(i for i in range(plan.num_segments) if not first <= i <= last)
    return Core(first, last, replace(plan, edges=edges, layers=layers), others)


def kept_weights(
    target: str, plan: QuantPlan, core: Core, weights: FloatWeights, again: Again | None, requantize: bool
) -> str:
    """UserError where a layer's weights outside the core are not those within it, unless they are to be replaced;
    then what that changes is said, and returned.
    """
    errors: dict[str, float] = {}
    for layer in plan.layers:
        inside = weights.in_segment(layer, core.first)
        if again is not None and layer in again.schemes:
            scheme = again.schemes[layer]
            assert scheme.weight is not None
            inside = dequantize_weight(quantized_again(again.weights, layer, scheme), scheme.weight)
        outside = [weights.in_segment(layer, i) for i in core.others]
        worst = max(float((inside - other).norm() / other.norm()) for other in outside)
        errors |= {layer: worst} if worst > 0 else {}
    if not requantize:
        why = "but the policy has one weight for all steps, and this is another than in the steps between"
        raise_refused(target, {n: Refusal(n, "segments", list(plan.edges), why, NEAREST) for n in errors}, True)
    said = ""
    if errors:
        worst_layer = max(errors, key=lambda layer: errors[layer])
        mean = sum(errors.values()) / len(errors)
        said = (
            f"in the first and last steps {len(errors)} Linears now have the weights of the steps between, other than "
            f"in the artifact by {mean:.2%} in the mean, at most {errors[worst_layer]:.2%} ({worst_layer})"
        )
        print(said)
    return said


def step_policy(adapter: ModelAdapter, plan: QuantPlan, core: Core) -> dict[str, Any]:
    """The policy without its scope. Raises UserError for a pipeline that cannot be tried out: its steps are counted."""
    scheduler = make_scheduler(adapter)
    try:
        steps = try_out(adapter, scheduler)
    except TrialError as error:
        raise UserError(
            f"--to vllm-omni: the steps of {adapter.name} cannot be counted ({error}), so that no "
            "diffusion_step_policy can be written. Quantize with one scheme for all noise levels (segments=[0, 1])."
        ) from error
    calls = max(len(steps) // len(scheduler.timesteps), 1)  # of denoisers in a step
    levels = [levels_of([step], adapter.timestep_scale)[0] for step in steps[::calls]]
    segments = [interval_of(plan.edges, min(max(level, 0.0), 1.0)) for level in levels]
    # sampling goes from noise to none, segments from none to noise
    first, last = sum(i > core.last for i in segments), sum(i < core.first for i in segments)
    print(
        f"diffusion_step_policy: of {len(segments)} steps the first {first} and the last {last} in 16 bits. Programs "
        "that read it do so for other formats than int8 so far: docs/deploy.md"
    )
    return {
        "schema_version": 1,
        "type": "first_last_n",
        "index_space": "denoising_loop_iteration",
        "default_mode": "native",
        "first_steps": {"count": first, "mode": "a16"},
        "last_steps": {"count": last, "mode": "a16"},
        "overlap": "a16",
        "reasoner": "native",
    }
