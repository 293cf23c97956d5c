"""The variance of the uncorrelated rest: a denoiser that is float with known slope, bias and noise, guided or not.

Legend: B samples, C channels, H, W.
"""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.quant import QuantSpec, Recipe, quantize_denoiser
from viditq.quant.artifact import load_denoiser
from viditq.quant.artifact_writer import save_denoiser
from viditq.quant.calibration.context import StepContext
from viditq.quant.correction.guidance import mixing_weights
from viditq.quant.correction.ptqd import (
    CorrectionFit,
    attach_corrections,
    corrections_of,
    fit_correction,
    latest_variance,
)

SLOPE, DEVIATION, GUIDANCE = 0.2, 0.3, 3.0
BIAS = torch.tensor([0.1, -0.2, 0.3, 0.0]).view(1, 4, 1, 1)
TIMES = (850, 450, 50)


def drawn(seed: int, batch: int) -> Tensor:
    return torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


class Exact(nn.Module):
    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return torch.tanh(hidden_states) + 0.5 * hidden_states.roll(1, -1)


class Spoiled(Exact):
    """shared: correlation of the noise of a batch's two halves."""

    def __init__(self, shared: float = 0.0) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        exact, batch = super().forward(hidden_states, timestep), len(hidden_states)
        noise = drawn(int(hidden_states.double().sum() * 1e4) % 2**31, batch)
        if self.shared:
            own = drawn(1 + int(timestep), batch)
            halves = noise[: batch // 2].repeat(2, 1, 1, 1)
            noise = math.sqrt(self.shared) * halves + math.sqrt(1 - self.shared) * own
        return (1 + SLOPE) * exact + BIAS + DEVIATION * noise


class Scheduler:
    def step(self, model_output: Tensor, timestep: int, sample: Tensor, generator: object = None) -> Tensor:
        return sample - 0.3 * model_output


def sample(denoiser: nn.Module, scheduler: Scheduler, how: str, seed: int = 0) -> None:
    """A pipeline: two branches in one batch, in two calls, or none."""
    x = drawn(seed, 8)
    for t in TIMES:
        if how == "batch":
            null, prompt = denoiser(torch.cat([x, 0.5 * x + 1]), torch.tensor(t)).chunk(2)
        elif how == "calls":
            prompt, null = denoiser(0.5 * x + 1, torch.tensor(t)), denoiser(x, torch.tensor(t))
        else:
            prompt = null = denoiser(x, torch.tensor(t))
        guided = null + GUIDANCE * (prompt - null)
        if how == "rescaled":
            guided = guided.abs()
        x = scheduler.step(guided, t, x)


def fitted(how: str, shared: float = 0.0) -> CorrectionFit:
    exact, scheduler = Exact(), Scheduler()
    with CorrectionFit(exact, Spoiled(shared), num_buckets=10, scheduler=scheduler) as fit, torch.no_grad():
        sample(exact, scheduler, how)
    assert "step" not in vars(scheduler), "as it was before"
    return fit


OF_MIX = GUIDANCE**2 + (1 - GUIDANCE) ** 2


@pytest.mark.parametrize(
    ("how", "shared", "factor"),
    [
        ("alone", 0.0, 1.0),
        ("batch", 0.0, OF_MIX),
        ("calls", 0.0, OF_MIX),
        ("batch", 0.5, OF_MIX + 2 * GUIDANCE * (1 - GUIDANCE) * 0.5),
    ],
)
def test_slope_bias_and_variance_are_found(how: str, shared: float, factor: float) -> None:
    correction = fit_correction(fitted(how, shared).state())
    assert correction.variance is not None
    for t in TIMES:
        bucket = t // 100
        assert float(correction.slope[bucket]) == pytest.approx(SLOPE, abs=0.02)
        torch.testing.assert_close(correction.bias[bucket], BIAS.flatten(), atol=0.02, rtol=0)
        expected = factor * DEVIATION**2 / (1 + SLOPE) ** 2
        assert float(correction.variance[bucket]) == pytest.approx(expected, rel=0.06)
    assert torch.equal(correction.variance[3], correction.variance[4])


def test_parts_merge_to_the_whole() -> None:
    parts = []
    for seeds in ((0,), (1,), (0, 1)):
        exact, scheduler = Exact(), Scheduler()
        with CorrectionFit(exact, Spoiled(), num_buckets=10, scheduler=scheduler) as fit, torch.no_grad():
            for seed in seeds:
                sample(exact, scheduler, "batch", seed)
        parts.append(fit.state())
    merged = CorrectionFit.merge_states(*parts[:2])
    assert merged.keys() == parts[2].keys()
    for name, value in parts[2].items():
        torch.testing.assert_close(merged[name], value, rtol=1e-12, atol=1e-9)


def test_other_guidance_is_refused() -> None:
    with pytest.raises(UserError, match="mixes"):
        fitted("rescaled")


def test_weights_may_differ_by_sample_and_channel() -> None:
    branches, wanted = drawn(3, 12).unflatten(0, (2, 6)).flatten(3), torch.rand(2, 6, 4)
    guided = (branches * wanted[..., None]).sum(0)
    torch.testing.assert_close(mixing_weights(branches, guided), wanted.double(), atol=1e-5, rtol=1e-5)
    same = torch.stack([branches[0], branches[0]])  # no prompt differs from the null one: any mix will do
    assert float(mixing_weights(same, 1.0 * branches[0]).sum(0).sub(1).abs().max()) < 1e-5


def test_the_sampler_is_told_the_variance_of_this_step() -> None:
    fit, denoiser, context = fitted("batch"), Exact(), StepContext((0, 1))
    context.attach(denoiser)
    attach_corrections(denoiser, fit.state(), context)
    found = corrections_of(denoiser)
    assert latest_variance(found) == 0.0
    for t in TIMES:
        denoiser(drawn(0, 2), torch.tensor(t))
        assert latest_variance(found) == float(found[0].variance[t // 100]) > 0
        assert latest_variance(found) == 0.0, "asked once"


class Pixelwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return self.fc(hidden_states.movedim(1, -1) * (1 + timestep / 500)).movedim(-1, 1)


@pytest.mark.parametrize("stochastic", [False, True])
def test_the_artifact_holds_it_where_it_was_fitted(stochastic: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    exact, denoiser, scheduler = Pixelwise(), Pixelwise(), Scheduler()
    denoiser.load_state_dict(exact.state_dict())
    plan = Recipe(QuantSpec(3, granularity="channel")).resolve(["fc"])
    context = quantize_denoiser(denoiser, plan, None)
    with CorrectionFit(exact, denoiser, scheduler=scheduler if stochastic else None) as fit, torch.no_grad():
        sample(exact, scheduler, "batch")
    attach_corrections(denoiser, fit.state(), context)
    save_denoiser(tmp_path / "artifact", denoiser, plan, {})
    loaded = corrections_of(load_denoiser(tmp_path / "artifact", Pixelwise)[0])[0]
    expected = corrections_of(denoiser)[0].variance
    assert (loaded.variance is not None) == stochastic
    assert not stochastic or (torch.equal(loaded.variance, expected) and float(expected.min()) > 0)
