"""Noise that is added after the first step, once, a sample's own, whatever a step returns."""

import copy
import inspect
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.models.nudge import nudged

LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@dataclass
class Output:
    prev_sample: Tensor


class Scheduler:
    def __init__(self, output: str = "tuple") -> None:
        self.output = output

    def step(self, prediction: Tensor, t: int, latents: Tensor, return_dict: bool = True) -> object:
        return (latents, prediction) if self.output == "tuple" else Output(latents)


def sample(pipeline: object, size: float, seeds: list[int], latents: Tensor = LATENTS) -> list[Tensor]:
    """What each of two steps leaves."""
    left = []
    with nudged(pipeline, size, seeds):
        for t in (1, 0):
            out = pipeline.scheduler.step(latents, t, latents)  # type: ignore[attr-defined]
            left.append(out[0] if isinstance(out, tuple) else out.prev_sample)
    return left


@pytest.mark.parametrize("output", ["tuple", "class"])
def test_only_the_first_step_is_moved(output):
    pipeline = SimpleNamespace(scheduler=Scheduler(output))
    with nudged(pipeline, 1e-3, [5, 9]):
        step = pipeline.scheduler.step
        assert "return_dict" in inspect.signature(step).parameters  # pipelines look for what a step takes
        step(LATENTS, 1, LATENTS)
    first, second = sample(pipeline, 1e-3, [5, 9])
    assert (first - LATENTS).std() == pytest.approx(1e-3, rel=0.1) and torch.equal(second, LATENTS)
    assert "step" not in vars(pipeline.scheduler)
    assert all(torch.equal(left, LATENTS) for left in sample(pipeline, 0.0, [5, 9]))


def test_a_copy_of_the_scheduler_steps_itself():
    """LTX-2 steps its sound by one: what it steps must not be the frames' scheduler."""

    class Counting(Scheduler):
        taken = 0

        def step(self, *args: object, **kwargs: object) -> object:
            self.taken += 1
            return super().step(*args, **kwargs)  # type: ignore[arg-type]

    scheduler = Counting()
    with nudged(SimpleNamespace(scheduler=scheduler), 1e-3, [5, 9]):
        beside = copy.deepcopy(scheduler)
        moved = [one.step(LATENTS, 1, LATENTS)[0] for one in (scheduler, beside, beside)]
    assert (scheduler.taken, beside.taken) == (1, 2)
    assert [bool((left != LATENTS).any()) for left in moved] == [True, True, False]


def test_noise_of_a_sample_does_not_depend_on_batch_mates():
    pipeline = SimpleNamespace(scheduler=Scheduler())
    together, alone = sample(pipeline, 1e-3, [5, 9])[0], sample(pipeline, 1e-3, [9], LATENTS[1:])[0]
    assert torch.equal(together[1:], alone)


def test_noise_is_no_less_than_the_rounding_of_narrow_latents():
    latents = torch.ones(1, 4, 8, 8, dtype=torch.bfloat16)
    moved = sample(SimpleNamespace(scheduler=Scheduler()), 1e-6, [0], latents)[0]
    assert moved.dtype == torch.bfloat16 and (moved != latents).float().mean() > 0.3


def test_latents_laid_out_otherwise_are_moved_too():
    flattened = LATENTS.flatten(0, 1)  # frames on the batch axis, as some pipelines have them
    moved = sample(SimpleNamespace(scheduler=Scheduler()), 1e-3, [5, 9], flattened)[0]
    assert (moved - flattened).std() == pytest.approx(1e-3, rel=0.1)


def test_a_pipeline_without_such_steps_is_refused():
    with pytest.raises(UserError, match=r"noise_floor\.latents=0"), nudged(SimpleNamespace(), 1e-6, [0]):
        pass
    still = SimpleNamespace(scheduler=Scheduler())
    with pytest.raises(UserError, match="without its scheduler's steps"), nudged(still, 1e-6, [0]):
        pass
