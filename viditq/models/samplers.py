"""The original project's samplers as settings of diffusers' schedulers, and its guidance.

Legend: B samples, c latent channels, T, h, w frames and latent size.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from viditq.errors import UserError

# Latents know no range to clip to; betas are linear over 1,000 training steps.
NOISE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def _ancestral() -> Any:
    return DDPMScheduler(**NOISE, variance_type="learned_range", clip_sample=False, timestep_spacing="linspace")


def _ddim() -> Any:
    """DDIM that ends in the predicted sample itself; diffusers' DDIMScheduler steps between other noise levels."""
    return DPMSolverMultistepScheduler(**NOISE, solver_order=1, final_sigmas_type="zero")


def _dpm_solver() -> Any:
    return DPMSolverMultistepScheduler(
        **NOISE, solver_order=2, timestep_spacing="linspace", euler_at_final=True, final_sigmas_type="sigma_min"
    )


SAMPLERS: dict[str, Callable[[], Any]] = {"ancestral": _ancestral, "ddim": _ddim, "dpm_solver": _dpm_solver}
"""ancestral and ddim: Open-Sora's `iddpm`, with and without new noise; dpm_solver: DPM-Solver++, second order."""


def make_sampler(name: str) -> Any:
    """The scheduler of that name; raises UserError for an unknown one."""
    if name not in SAMPLERS:
        raise UserError(f"model.call.sampler={name!r} is unknown; choose one of {', '.join(SAMPLERS)}.")
    return SAMPLERS[name]()


def set_steps(scheduler: Any, num_steps: int, device: Any) -> None:
    """Fix the timesteps, from 999 down to 0; raises UserError if two would coincide."""
    if not 1 <= num_steps <= 1000:
        raise UserError(f"model.num_steps={num_steps} must be 1 to 1000 here.")
    if getattr(scheduler.config, "solver_order", None) == 1:
        grid = [round(999 * i / (num_steps - 1)) for i in range(num_steps)] if num_steps > 1 else [999]
        scheduler.set_timesteps(timesteps=grid[::-1], device=device)
    else:
        scheduler.set_timesteps(num_steps, device=device)


def guide(both: Tensor, scale: float, num_channels: int | None) -> Tensor:
    """Classifier-free guidance, u + scale (c - u), of [2 B, c, T, h, w] (null captions first) -> [B, c, T, h, w].

    num_channels: only the first ones are guided, the rest are the caption's own (Open-Sora: 3); None: all.
    """
    null, caption = both.chunk(2)
    guided = null + scale * (caption - null)
    return guided if num_channels is None else torch.cat([guided[:, :num_channels], caption[:, num_channels:]], dim=1)


def is_sampler(scheduler: Any, name: str) -> bool:
    """Whether the scheduler is the sampler of that name, whatever has been wrapped around its methods."""
    wanted = make_sampler(name)
    settings = {key: value for key, value in wanted.config.items() if not key.startswith("_")}
    return isinstance(scheduler, type(wanted)) and settings == {key: scheduler.config.get(key) for key in settings}


def takes_variance(scheduler: Any) -> bool:
    """Whether `step` wants the learned variance beside the noise (DPM-Solver's would cut latents to 3 channels)."""
    learned = getattr(scheduler.config, "variance_type", None) in ("learned", "learned_range")
    return learned and isinstance(scheduler, DDPMScheduler)
