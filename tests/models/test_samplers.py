"""The original's samplers and guidance, with a toy denoiser (tests/data/golden/sampling.safetensors)."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from torch import Tensor

from viditq.errors import UserError
from viditq.models.samplers import SAMPLERS, guide, is_sampler, make_sampler, set_steps, takes_variance

GOLDEN = load_file(Path(__file__).parents[1] / "data" / "golden" / "sampling.safetensors")


def toy(x: Tensor, timestep: float, y: Tensor) -> Tensor:
    """Noise and variance of the toy denoiser: any smooth function of all its inputs does."""
    u = timestep / 1000
    c = y.flatten(1).mean(1).reshape(-1, *[1] * (x.ndim - 1))
    noise = 0.7 * x * math.cos(u) + 0.3 * x.tanh() + 0.5 * c * math.sin(3 * u)
    return torch.cat([noise, 0.8 * (x / 2).tanh() + 0.1 * c], dim=1)


def sample(name: str, num_steps: int, scale: float, channels: int | None, prefix: str = "") -> Iterator[Tensor]:
    """The latents after each step."""
    scheduler = make_sampler(name)
    set_steps(scheduler, num_steps, "cpu")
    x, y = GOLDEN[f"{prefix}init_noise"], torch.cat([GOLDEN[f"{prefix}y_{k}"] for k in ("uncond", "cond")])
    for t in scheduler.timesteps:
        output = guide(toy(torch.cat([x, x]), t.item(), y), scale, channels)
        if not takes_variance(scheduler):
            output = output[:, : x.shape[1]]
        x = scheduler.step(output, t, x, return_dict=False)[0]
        yield x


def assert_close(ours: Tensor, reference: Tensor) -> None:
    assert (ours - reference).abs().max() < 1e-5 * reference.abs().max()


@pytest.mark.parametrize(("num_steps", "scale"), [(10, 7), (10, 4), (20, 7), (100, 7)])
def test_ddim(num_steps: int, scale: int) -> None:
    steps = list(sample("ddim", num_steps, scale, 3))
    assert_close(steps[-1], GOLDEN[f"ddim_{num_steps}_cfg{scale}/final"])
    if f"ddim_{num_steps}_cfg{scale}/x_prev" in GOLDEN:
        for ours, reference in zip(steps, GOLDEN[f"ddim_{num_steps}_cfg{scale}/x_prev"], strict=True):
            assert_close(ours, reference)


@pytest.mark.parametrize("scale", [7, 4])
def test_ancestral(scale: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the noise that the original drew."""
    draws = iter(GOLDEN[f"ancestral_10_cfg{scale}/noise"])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(draws))
    assert_close(list(sample("ancestral", 10, scale, 3))[-1], GOLDEN[f"ancestral_10_cfg{scale}/final"])


@pytest.mark.parametrize("num_steps", [9, 27])
def test_dpm_solver(num_steps: int) -> None:
    """Where the original's fractional timesteps are whole numbers, as they must be for diffusers."""
    ours = list(sample("dpm_solver", num_steps, 4.5, None, "dpm/"))[-1]
    assert_close(ours, GOLDEN[f"dpm/dpmpp_{num_steps}_cfg4.5/final"])


def test_timesteps_are_the_originals() -> None:
    for name in ("ancestral", "ddim"):
        for num_steps in (1, 2, 10, 20, 30, 50, 100, 250, 1000):
            scheduler = make_sampler(name)
            set_steps(scheduler, num_steps, "cpu")
            even = [round(999 * i / max(num_steps - 1, 1)) for i in range(num_steps)]
            if num_steps > 1:
                assert scheduler.timesteps.tolist() == even[::-1]
    recorded = GOLDEN["ddim_10_cfg7/timestep"].tolist()
    set_steps(scheduler := make_sampler("ddim"), 10, "cpu")
    assert scheduler.timesteps.tolist() == recorded


def test_guidance_of_some_channels() -> None:
    both = torch.randn(4, 8, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    null, caption = both[:2], both[2:]
    every = null + 5 * (caption - null)
    assert torch.equal(guide(both, 5, None), every)
    some = guide(both, 5, 3)
    assert torch.equal(some[:, :3], every[:, :3]) and torch.equal(some[:, 3:], caption[:, 3:])
    whole = GOLDEN["ddim_10_cfg7/model_output"][0]
    order = torch.cat([whole[2:], whole[:2]])  # the original puts the null captions last
    torch.testing.assert_close(guide(order, 7, 3)[:, :4], GOLDEN["ddim_10_cfg7/guided_output"][0][:, :4])


def test_samplers_are_told_apart() -> None:
    for name in SAMPLERS:
        assert [other for other in SAMPLERS if is_sampler(make_sampler(name), other)] == [name]
        with_files_extras = type(make_sampler(name)).from_config(dict(make_sampler(name).config))
        assert is_sampler(with_files_extras, name)
    assert not is_sampler(DDPMScheduler(), "ancestral")


def test_what_cannot_be_sampled_is_refused() -> None:
    with pytest.raises(UserError, match=r"sampler='euler'.*ancestral, ddim, dpm_solver"):
        make_sampler("euler")
    for num_steps in (0, 1001):
        with pytest.raises(UserError, match=f"num_steps={num_steps} must be 1 to 1000"):
            set_steps(make_sampler("ddim"), num_steps, "cpu")
