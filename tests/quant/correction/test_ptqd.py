"""PTQD's correction against numpy's least squares, through hooks and through the artifact.

Legend: B batch, C channels, H, W.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.quant import QuantSpec, Recipe, quantize_denoiser
from viditq.quant.artifact import load_denoiser
from viditq.quant.artifact_writer import save_denoiser
from viditq.quant.calibration.context import StepContext
from viditq.quant.correction.ptqd import CorrectionFit, attach_corrections, channel_axis_of, fit_correction

STEPS = (90, 510, 890)


class Drawn(nn.Module):
    """Its output is what it is given; `error` makes another one of it."""

    def __init__(self, error) -> None:
        super().__init__()
        self.error = error

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        return self.error(hidden_states, float(timestep))


class Pixelwise(nn.Module):
    """A Linear over the channels of each pixel; a learned variance comes behind the prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 8)

    def forward(self, hidden_states: Tensor, timestep: Tensor, return_dict: bool = False):
        out = self.fc(hidden_states.movedim(1, -1) * (1 + timestep / 500)).movedim(-1, 1)
        return SimpleNamespace(sample=out) if return_dict else (out,)


def latents(step: int, channels: int = 4) -> Tensor:
    return torch.randn(6, channels, 5, 5, generator=torch.Generator().manual_seed(step)) + 0.3


def spoiled(x: Tensor, step: float) -> Tensor:
    """Known slope and bias by step, and what looks like noise."""
    noise = (x * 1000).sin() * 0.05
    return x * (1 + step / 2000) + torch.tensor([0.1, -0.2, 0.3, 0.0]).view(1, 4, 1, 1) + noise


def fitted(exact: nn.Module, quantized: nn.Module, steps=STEPS, parts: int = 1) -> CorrectionFit:
    with CorrectionFit(exact, quantized, num_buckets=10) as fit, torch.no_grad():
        for step in steps:
            for part in latents(step).chunk(parts):
                exact(part, torch.tensor(step))
    return fit


def test_slope_and_bias_are_least_squares() -> None:
    correction = fit_correction(fitted(Drawn(lambda x, step: x), Drawn(spoiled), parts=2).state())
    for step in STEPS:
        x, error = latents(step).double(), spoiled(latents(step), step).double() - latents(step).double()
        slope = np.polyfit(x.flatten().numpy(), error.flatten().numpy(), 1)[0]
        bias = (error - slope * x).mean((0, 2, 3))
        bucket = step // 100
        assert float(correction.slope[bucket]) == pytest.approx(slope, rel=1e-5)
        assert correction.bias[bucket].tolist() == pytest.approx(bias.tolist(), abs=1e-6)
    assert torch.equal(correction.slope[3], correction.slope[5]) and torch.equal(correction.bias[9], correction.bias[8])


def test_a_negative_slope_counts_as_none() -> None:
    correction = fit_correction(fitted(Drawn(lambda x, step: x), Drawn(lambda x, step: 0.8 * x)).state())
    assert torch.equal(correction.slope, torch.zeros(10))
    expected = [float((-0.2 * latents(90))[:, c].mean()) for c in range(4)]
    assert correction.bias[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_output_is_corrected_by_the_formula() -> None:
    fit = fitted(Drawn(lambda x, step: x), Drawn(spoiled))
    denoiser, context = Drawn(spoiled), StepContext((0, 1))
    context.attach(denoiser)
    attach_corrections(denoiser, fit.state(), context)
    correction = fit_correction(fit.state())
    for step in STEPS:
        out, raw, bucket = denoiser(latents(step), torch.tensor(step)), spoiled(latents(step), step), step // 100
        wanted = (raw - correction.bias[bucket].view(1, 4, 1, 1)) / (1 + correction.slope[bucket])
        torch.testing.assert_close(out, wanted)
        assert (out - latents(step)).norm() < 0.3 * (raw - latents(step)).norm()


def test_parts_merge_to_the_whole() -> None:
    exact, quantized = Drawn(lambda x, step: x), Drawn(spoiled)
    parts = [fitted(exact, quantized, steps).state() for steps in (STEPS[:1], STEPS[1:])]
    merged, whole = CorrectionFit.merge_states(*parts), fitted(exact, quantized).state()
    assert merged.keys() == whole.keys()
    assert all(torch.equal(merged[name], whole[name]) for name in whole)


def test_the_artifact_keeps_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    exact = Pixelwise()
    denoiser = Pixelwise()
    denoiser.load_state_dict(exact.state_dict())
    plan = Recipe(QuantSpec(3, granularity="channel")).resolve(["fc"])
    context = quantize_denoiser(denoiser, plan, None)
    raw = [denoiser(latents(step), torch.tensor(step))[0].detach() for step in STEPS]
    attach_corrections(denoiser, fitted(exact, denoiser).state(), context)
    save_denoiser(tmp_path / "artifact", denoiser, plan, {})
    loaded = load_denoiser(tmp_path / "artifact", Pixelwise)[0]
    for step, before in zip(STEPS, raw, strict=True):
        arguments = (latents(step), torch.tensor(step))
        wanted, float_out = denoiser(*arguments)[0], exact(*arguments)[0]
        assert torch.equal(loaded(*arguments)[0], wanted)
        assert torch.equal(loaded(*arguments, return_dict=True).sample, wanted)
        assert torch.equal(wanted[:, 4:], before[:, 4:]), "the learned variance stays"
        assert (wanted - float_out)[:, :4].norm() < (before - float_out)[:, :4].norm()


def test_channels_of_clips() -> None:
    model = Drawn(None)
    model.config = SimpleNamespace(in_channels=4)
    assert channel_axis_of(model, torch.empty(2, 4, 8, 3, 3)) == 1
    assert channel_axis_of(model, torch.empty(2, 8, 4, 3, 3)) == 2
    for shape in ((2, 4, 4, 3, 3), (2, 16, 64)):  # cannot be told; packed tokens
        with pytest.raises(UserError, match="correction=null"):
            channel_axis_of(model, torch.empty(shape))
