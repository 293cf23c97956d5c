"""A change of latents too small to mean anything, to see how far sampling carries it (the third noise floor)."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.models.step_noise import stepping_by

STREAM = 1 << 62  # of the numbers that are added: apart from the noise of samples


@contextmanager
def nudged(pipeline: Any, size: float, seeds: Sequence[int]) -> Iterator[None]:
    """Within, normal noise of `size` is added to what the scheduler's first step leaves.

    size: its standard deviation, but at least the rounding of the latents' dtype, which would swallow less; 0: none.
    seeds: one a sample, so that its noise does not depend on batch mates.
    Raises UserError for a pipeline whose scheduler takes no step.
    """
    if not size:
        yield
        return
    scheduler = getattr(pipeline, "scheduler", None)
    step = getattr(scheduler, "step", None)
    if scheduler is None or step is None:
        raise UserError(f"{type(pipeline).__name__} has no scheduler whose latents could be changed. {_REMEDY}")
    nudging = _Nudging(step, size, seeds)
    with stepping_by(scheduler, nudging):
        yield
    if not nudging.steps:
        raise UserError(f"{type(pipeline).__name__} samples without its scheduler's steps. {_REMEDY}")


class _Nudging:
    """In a scheduler's `step`, which it calls. An object, since it is copied with its scheduler: a pipeline that makes
    sound steps a copy beside (LTX-2), and a closure would go on stepping the first one. Of a copy, too, the first step.
    """

    def __init__(self, step: Any, size: float, seeds: Sequence[int]) -> None:
        self.step, self.size, self.seeds, self.steps = step, size, seeds, 0
        functools.update_wrapper(self, step)  # pipelines look at its signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.steps += 1
        out = self.step(*args, **kwargs)
        return out if self.steps > 1 else _moved(out, self.size, self.seeds)


_REMEDY = "Set noise_floor.latents=0, which leaves this noise floor out."


def _moved(out: Any, size: float, seeds: Sequence[int]) -> Any:
    """What a step returns, a tuple or diffusers' output class, with other latents."""
    if isinstance(out, tuple):
        return (_add(out[0], size, seeds), *out[1:])
    return replace(out, prev_sample=_add(out.prev_sample, size, seeds))


def _add(latents_B: Tensor, size: float, seeds: Sequence[int]) -> Tensor:
    """Batches may hold a multiple of the samples (guidance) or, flattened, none of their axis: one draw then."""
    size = max(size, torch.finfo(latents_B.dtype).eps)
    each = seeds if len(latents_B) == len(seeds) else seeds[:1]
    shape = latents_B.shape[1:] if len(each) == len(latents_B) else latents_B.shape
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(STREAM + seed)) for seed in each]
    noise = torch.stack(draws) if len(each) == len(latents_B) else draws[0]
    return latents_B + (size * noise).to(latents_B)
