"""Noise that schedulers draw in their steps: from the generators of the samples, whatever the pipeline passes on."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from viditq.models.schedulers import takes_generator


@contextmanager
def seeded_steps(pipeline: Any, generators: list[torch.Generator]) -> Iterator[None]:
    """Within, the scheduler's steps draw from `generators`, one a sample.

    A pipeline that passes them on itself (`prepare_extra_step_kwargs`), and a scheduler that takes none, stay as they
    are.
    """
    scheduler: Any = getattr(pipeline, "scheduler", None)
    if hasattr(pipeline, "prepare_extra_step_kwargs") or not takes_generator(scheduler):
        yield
        return
    step, own = scheduler.step, "step" in vars(scheduler)
    scheduler.step = functools.partial(step, generator=generators[0] if len(generators) == 1 else generators)
    try:
        yield
    finally:
        if own:
            scheduler.step = step
        else:
            del scheduler.step
