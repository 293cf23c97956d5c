"""What a denoiser is told at pure noise and at none: measured on the pipeline's own sampling, or checked against it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from viditq.errors import UserError
from viditq.models.schedulers import make_scheduler
from viditq.models.trial import Step, TrialError, try_out

ONE_LEVEL = 0.01  # steps that lie closer together than this are no schedule, but one read on another scale
OFF = 0.005  # of the scale: what rounding of timesteps to whole numbers or to bfloat16 moves them by
ROUNDING = 1e-5  # by which a level may lie outside of [0, 1]
FEWEST = 4  # steps to measure with
REMEDY = (
    "Give what the denoiser is told at pure noise: model.timestep_scale=1000, =1 where it is told sigma, or "
    "model.timestep_scale={at_noise: 0, at_clean: 1, argument: t}."
)


def measured_scale(adapter: Any) -> float | dict[str, Any]:
    """`timestep_scale` of a pipeline, from what its call tells the denoiser at the scheduler's steps.

    Raises UserError where the call cannot be tried out, or what is told is not in proportion to the noise.
    """
    try:
        steps = try_out(adapter, make_scheduler(adapter), max(adapter.num_steps, FEWEST))
    except TrialError as error:
        if "height" in str(error) and "width" in str(error):
            refused = f"{adapter.pipeline} takes no such size: {error}. Set model.height and model.width."
            raise UserError(refused) from error
        raise UserError(f"What {adapter.pipeline} tells its denoiser cannot be measured ({error}). {REMEDY}") from error
    check_levels([step.level for step in steps], f"{adapter.pipeline}: measured on its scheduler")
    noisy, clean = (pick(steps, key=lambda step: step.level) for pick in (max, min))
    slope = (noisy.told - clean.told) / (noisy.level - clean.level)
    at_clean = clean.told - slope * clean.level
    at_noise, at_clean = (_rounded(value, abs(slope)) for value in (at_clean + slope, at_clean))
    off = max(abs(step.told - at_clean - (at_noise - at_clean) * step.level) for step in steps)
    if not off < OFF * abs(at_noise - at_clean):
        pairs = ", ".join(f"{step.told:g} at {step.level:.3g}" for step in steps[:4])
        raise UserError(
            f"{adapter.pipeline} tells its denoiser what is not in proportion to the noise level ({pairs}). {REMEDY}"
        )
    if at_clean == 0 and steps[0].argument == adapter.timestep_argument:
        return at_noise
    return {"at_noise": at_noise, "at_clean": at_clean, "argument": steps[0].argument}


def check_levels(levels: Sequence[float], what: str) -> None:
    """Raises UserError for steps outside of [0, 1], and for several that all lie at one noise level."""
    low, high = min(levels), max(levels)
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise UserError(f"{what}, sampling steps lie at noise levels {high:g} to {low:g}, outside of [0, 1]. {REMEDY}")
    if len(set(levels)) > 1 and high - low < ONE_LEVEL:
        raise UserError(
            f"{what}, all sampling steps lie at one noise level, {high:.3g} to {low:.3g}: it is another. {REMEDY}"
        )


def levels_of(steps: Sequence[Step], scale: Any) -> list[float]:
    """Noise levels of steps by a `timestep_scale`, each once."""
    fields = scale if isinstance(scale, dict) else {"at_noise": scale}
    noise, clean = fields.get("at_noise", 1000.0), fields.get("at_clean", 0.0)
    return list(dict.fromkeys((step.told - clean) / (noise - clean) for step in steps))


def _rounded(value: float, size: float) -> float:
    """Two digits of `size`, unless that moves the value."""
    digit = 10.0 ** (len(f"{size:.0f}") - 2) if size >= 10 else 0.1 if size >= 1 else 0.01
    near = round(value / digit) * digit
    return near if abs(near - value) <= OFF * size else value
