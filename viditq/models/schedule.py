"""The noise levels that sampling will visit, as the denoiser is told of them."""

from viditq.models.adapter import ModelAdapter
from viditq.models.schedulers import make_scheduler
from viditq.models.timestep_scale import check_levels, levels_of
from viditq.models.trial import TrialError, try_out


def noise_levels(adapter: ModelAdapter) -> list[float] | None:
    """Noise levels in [0, 1] of the sampling steps, in their order; None where the pipeline cannot be tried out.

    Raises UserError where model.timestep_scale puts steps outside of [0, 1], or all of them at one level.
    """
    try:
        steps = try_out(adapter, make_scheduler(adapter))
    except TrialError:
        return None
    levels = levels_of(steps, adapter.timestep_scale)
    check_levels(levels, f"model.timestep_scale={adapter.timestep_scale}")
    return [min(max(level, 0.0), 1.0) for level in levels]
