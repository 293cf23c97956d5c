"""Which plan a run has for its denoisers and text encoders, held against the model and its sampling steps."""

from collections.abc import Mapping
from itertools import pairwise

from viditq.data.prompts import PromptData
from viditq.errors import UserError
from viditq.export.folding import only_foldable
from viditq.models.adapter import ModelAdapter
from viditq.models.roles import FLOAT, USUAL
from viditq.models.schedule import noise_levels
from viditq.models.text_encoders import build_encoder, encoder_names
from viditq.quant.calibration.noise_level import bucket_edges, interval_of, mixed_bucket
from viditq.quant.description.plan import QuantPlan
from viditq.quant.execution.model_linears import linear_names, shapes_of
from viditq.quant.search.policy import SensitivitySearch
from viditq.quant.search.treatment_policy import TreatmentSearch
from viditq.quant.setting import QuantSetting
from viditq.quant.text_encoder import text_encoder_plan
from viditq.treated_parts import check_treatments

MOST_BUCKETS = 1000  # as many as there are timesteps


def denoiser_plan(adapter: ModelAdapter, quant: QuantSetting) -> tuple[QuantPlan, dict[str, str]]:
    """The plan for this model and its Linears' roles.

    Refused here: unknown layers, Linears without a role, a search that has nothing to find, and smoothing that could be
    folded away nowhere.
    """
    denoiser = adapter.build_denoiser()
    names = linear_names(denoiser)
    roles = adapter.linear_roles(names)
    plan = only_foldable(quant.plan(names, [name for name, role in roles.items() if role == FLOAT]), denoiser)
    if isinstance(quant.policy, SensitivitySearch):
        quant.policy.check(plan, roles, shapes_of(denoiser), USUAL, adapter.left_in_float_bytes())
    if isinstance(quant.policy, TreatmentSearch):
        check_treatments(adapter, quant.policy, plan, roles)
    return plan, roles


def encoder_plans(adapter: ModelAdapter, quant: QuantSetting, data: PromptData) -> dict[str, QuantPlan]:
    """Text encoder -> its plan; raises UserError where none can be quantized, or none would be used."""
    if quant.text_encoder is None:
        return {}
    names = encoder_names(adapter)
    if data.ready_embeds:
        raise UserError(
            "quant/text_encoder: data.embeds stands in for the text encoder, so that what it costs could not be "
            "measured. Leave data.embeds out, or give quant/text_encoder=none."
        )
    return {name: text_encoder_plan(build_encoder(adapter, name), quant.text_encoder, name) for name in names}


def check_segments(adapter: ModelAdapter, plan: QuantPlan, num_buckets: int) -> None:
    """Raises UserError for a segment that needs statistics and has no step, or shares a bucket of them with another."""
    levels = noise_levels(adapter) if plan.needs_stats or plan.bits_vary else None
    if levels is None:
        return
    segments = [interval_of(plan.edges, level) for level in levels]
    for segment, (lo, hi) in enumerate(pairwise(plan.edges)):
        schemes = [plan.scheme(layer, segment) for layer in plan.layers]
        needed = any(scheme is not None and scheme.needs_stats for scheme in schemes)
        if needed and segment not in segments:
            raise UserError(
                f"No sampling step falls into the segment of noise levels {lo:g} to {hi:g}: the steps "
                f"lie at {', '.join(f'{level:.3g}' for level in levels)}. Calibrate with more sampling steps, or use "
                "wider segments (quant.segments)."
            )
    _check_buckets(dict(zip(levels, segments, strict=True)), num_buckets)


def _check_buckets(segments: Mapping[float, int], num_buckets: int) -> None:
    """Raises UserError where a bucket of the statistics holds steps of two segments. segments: noise level -> its."""
    mixed = mixed_bucket(segments, num_buckets)
    if mixed is None:
        return
    steps = ", ".join(f"{level:.4g}" for level in segments if interval_of(bucket_edges(num_buckets), level) == mixed)
    enough = [n for n in range(num_buckets + 1, MOST_BUCKETS + 1) if mixed_bucket(segments, n) is None]
    raise UserError(
        f"quant.segments (or a plan file) parts the sampling steps {steps}, which share one of {num_buckets} buckets "
        f"of noise level that statistics are kept in. Move the edge between them to {mixed / num_buckets:g} or "
        f"{(mixed + 1) / num_buckets:g}" + (f", or give calibration.num_buckets={enough[0]}." if enough else ".")
    )
