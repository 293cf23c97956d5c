"""Noise that is drawn while a pipeline samples: from the generators of the samples, whatever it passes on."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from viditq.models.schedulers import takes_generator


@contextmanager
def seeded_steps(pipeline: Any, generators: list[torch.Generator]) -> Iterator[None]:
    """Within, the scheduler's steps draw from `generators`, one a sample, and all else from their first one's seed.

    All else is what a call draws from torch's global generator, which is left as it was: JoyImage-Edit draws the
    latents of its picture so, whatever generator it is given. The steps of a pipeline that passes generators on itself
    (`prepare_extra_step_kwargs`), and of a scheduler that takes none, stay as they are.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(generators[0].initial_seed())
        with _steps_of(pipeline, generators):
            yield


@contextmanager
def _steps_of(pipeline: Any, generators: list[torch.Generator]) -> Iterator[None]:
    scheduler: Any = getattr(pipeline, "scheduler", None)
    if hasattr(pipeline, "prepare_extra_step_kwargs") or not takes_generator(scheduler):
        yield
        return
    given = generators[0] if len(generators) == 1 else generators
    with stepping_by(scheduler, functools.partial(scheduler.step, generator=given)):
        yield


@contextmanager
def stepping_by(scheduler: Any, step: Any) -> Iterator[None]:
    """Within, `scheduler.step` is another function."""
    before, own = scheduler.step, "step" in vars(scheduler)
    scheduler.step = step
    try:
        yield
    finally:
        if own:
            scheduler.step = before
        else:
            del scheduler.step
