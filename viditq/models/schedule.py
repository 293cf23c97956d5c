"""The noise levels that sampling will visit, where the scheduler alone decides them."""

import inspect

from viditq.models.adapter import ModelAdapter
from viditq.models.registry import find_class
from viditq.models.samplers import set_steps

FULL_SCALE = 1000.0


def noise_levels(adapter: ModelAdapter) -> list[float] | None:
    """Noise levels in [0, 1] of the sampling steps; None where the pipeline has a say in them.

    That is so where the denoiser is told something else than the scheduler's timestep, and where the scheduler takes
    sigmas from the pipeline (flow matching, shifted by the size of the sample).
    """
    entry = adapter.index().get("scheduler")
    name = adapter.scheduler or (entry[1] if isinstance(entry, list) else None)
    cls = find_class(name) if name else None
    if cls is None or adapter.timestep_scale != FULL_SCALE:
        return None
    if "sigmas" in inspect.signature(cls.set_timesteps).parameters:
        return None
    scheduler = adapter.make_scheduler()
    try:
        if adapter.call.get("sampler") is not None:
            set_steps(scheduler, adapter.num_steps, "cpu")
        else:
            scheduler.set_timesteps(adapter.num_steps)
    except (ValueError, IndexError):  # the pipeline says what is wrong with the number of steps
        return None
    return [float(timestep) / FULL_SCALE for timestep in scheduler.timesteps]
