"""What a pipeline makes of its denoiser's outputs before a sampler's step: guidance, whose weights a fit finds.

Legend: J branches (with and without the prompt), B samples, C channels, M values of a channel.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from viditq.errors import UserError

TOLERANCE = 0.02  # of the norm; half precision stays below


def branches(outputs: list[Tensor], sample: Tensor) -> Tensor:
    """The outputs since the last step, each of some samples' branches, as [J, B, ...]; UserError if they do not fit."""
    if any(x.shape[1:] != sample.shape[1:] or len(x) % len(sample) for x in outputs):
        shapes = ", ".join(str(list(x.shape)) for x in outputs)
        raise _no_mix(f"outputs of shape {shapes} for a sample of {list(sample.shape)}")
    return torch.cat([x.unflatten(0, (-1, len(sample))) for x in outputs])


def mixing_weights(branches_JBCM: Tensor, guided_BCM: Tensor) -> Tensor:
    """[J, B, C] of the mix that is `guided`, float64, by least squares; UserError if it is no such mix."""
    branches_BCMJ, guided_BCM = branches_JBCM.double().movedim(0, -1), guided_BCM.double()
    weights_BCJ = torch.linalg.lstsq(branches_BCMJ, guided_BCM[..., None]).solution.squeeze(-1)
    rest = torch.einsum("bcmj,bcj->bcm", branches_BCMJ, weights_BCJ) - guided_BCM
    if not float(rest.norm()) <= TOLERANCE * float(guided_BCM.norm()):
        raise _no_mix("it changes them in another way")
    return weights_BCJ.movedim(-1, 0)


def watch_steps(scheduler: Any, seen: Callable[[Tensor, Tensor], None]) -> Callable[[], None]:
    """Calls seen(model_output, sample) before each `scheduler.step`; returns what ends it."""
    plain, own = scheduler.step, scheduler.__dict__.get("step")
    signature = inspect.signature(plain)

    @functools.wraps(plain)
    def step(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        seen(given["model_output"], given["sample"])
        return plain(*args, **kwargs)

    def end() -> None:
        del scheduler.step
        if own is not None:
            scheduler.step = own

    scheduler.step = step
    return end


def _no_mix(what: str) -> UserError:
    return UserError(
        "quant.correction=ptqd with a stochastic scheduler needs a pipeline that mixes its denoiser's outputs channel "
        f"by channel before the step ({what}). Use a deterministic model.scheduler, or quant.correction=ptqd_mean."
    )
