"""Several denoisers of one pipeline: each runs in its own noise levels, with names of its own."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.quant import CalibrationStats, Calibrator, QuantSpec, Recipe, SmoothSpec, linear_names, quantize_denoiser
from viditq.quant.artifact import load_denoiser
from viditq.quant.artifact_writer import save_denoiser
from viditq.quant.calibration.context import StepContext, TimestepScale
from viditq.quant.calibration.segment_sources import segment_sources
from viditq.quant.calibration.step_shares import step_shares
from viditq.quant.execution.linear import quant_linears
from viditq.quant.search.allocate import Search
from viditq.quant.search.candidates import candidates_of, groups_of
from viditq.quant.search.policy import found_plan, groups_by_name
from viditq.quant.search.proxy import OneStep, proxy_errors
from viditq.quant.search.sensitivity import Swapper

W4, A8 = QuantSpec(4, granularity="channel"), QuantSpec(8, granularity="token", dynamic=True)
EDGES = (0.0, 0.3, 0.6, 1.0)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.fc(x)


def pair() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"high": Denoiser(), "low": Denoiser()})


def sample(denoisers: nn.ModuleDict, steps: tuple[int, ...] = (900, 500, 100)) -> list[Tensor]:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return [denoisers["high" if t >= 700 else "low"](x, timestep=torch.full((2,), t)) for t in steps]


def calibrated(denoisers: nn.ModuleDict, steps: tuple[int, ...] = (900, 500, 100)) -> CalibrationStats:
    calibrator = Calibrator(denoisers, linear_names(denoisers))
    calibrator.set_sample_seeds([0, 1])
    with calibrator:
        sample(denoisers, steps)
    return calibrator.stats


def plan_of(denoisers: nn.ModuleDict) -> Any:
    return Recipe(W4, A8, SmoothSpec(0.5, per_segment=True), segments=EDGES).resolve(linear_names(denoisers))


def test_each_layer_is_observed_where_its_denoiser_runs() -> None:
    stats = calibrated(pair())
    assert list(stats.layers) == ["high.fc", "low.fc"]
    assert stats.layers["high.fc"].count.nonzero().flatten().tolist() == [17]
    assert stats.layers["low.fc"].count.nonzero().flatten().tolist() == [1, 9]


def test_segments_of_the_other_denoiser_take_the_nearest_of_their_own() -> None:
    denoisers = pair()
    plan, stats = plan_of(denoisers), calibrated(denoisers)
    assert segment_sources(denoisers, plan, stats) == {"high.fc": [2, 2, 2], "low.fc": [0, 1, 1]}
    quantize_denoiser(denoisers, plan, stats)
    assert list(quant_linears(denoisers)) == ["high.fc", "low.fc"]
    exact = sample(pair())
    for out, want in zip(sample(denoisers), exact, strict=True):
        assert 0 < (out - want).norm() / want.norm() < 0.2


def test_a_segment_that_no_denoiser_reaches_is_refused() -> None:
    denoisers = pair()
    stats = calibrated(denoisers, steps=(900, 100))
    with pytest.raises(UserError, match=r"no calibration data for high\.fc at noise levels 0\.3 to 0\.6"):
        quantize_denoiser(denoisers, plan_of(denoisers), stats)


def test_artifact_of_both(tmp_path: Any) -> None:
    denoisers = pair()
    plan = plan_of(denoisers)
    quantize_denoiser(denoisers, plan, calibrated(denoisers))
    save_denoiser(tmp_path / "artifact", denoisers, plan, {})
    loaded = load_denoiser(tmp_path / "artifact", pair)[0]
    assert isinstance(loaded, nn.ModuleDict)
    for out, want in zip(sample(loaded), sample(denoisers), strict=True):
        assert torch.equal(out, want)


def test_a_plan_of_one_denoiser_only() -> None:
    denoisers = pair()
    plan = Recipe(W4, A8, SmoothSpec(0.5, per_segment=True), segments=EDGES).resolve(["low.fc"])
    assert segment_sources(denoisers, plan, calibrated(denoisers)) == {"low.fc": [0, 1, 1]}
    quantize_denoiser(denoisers, plan, calibrated(pair()))


def test_a_search_measures_each_denoiser_where_it_runs() -> None:
    denoisers, edges = pair(), (0.0, 0.3, 1.0)  # both run in the second segment, only `low` in the first
    names = linear_names(denoisers)
    base = Recipe(W4, A8, SmoothSpec(0.5, per_segment=True), segments=edges).resolve(names)
    stats = calibrated(denoisers)
    shares = step_shares(stats, edges)
    assert shares == {"high.fc": (0.0, 1.0), "low.fc": (0.5, 0.5)}
    groups = groups_of(names, dict.fromkeys(names, "mlp"), dict.fromkeys(names, 64), dict.fromkeys(names, 8))
    space = Search(base, groups, {"weight": (3, 8)}, dict.fromkeys(names, (8, 8)), shares)
    candidates = candidates_of(space.cells, space.choices)
    assert {(c.group, c.segment) for c in candidates} == {("high.fc/mlp", 1), ("low.fc/mlp", 0), ("low.fc/mlp", 1)}
    swapper = Swapper(denoisers, edges, stats)
    one_step = OneStep(swapper)
    with one_step.recording():
        sample(denoisers)
    found = proxy_errors(denoisers, base, stats, groups_by_name(space), candidates, one_step).proxies(candidates)
    assert all(found[c] > 0 for c in candidates)
    plan = found_plan(space, {("high.fc/mlp", 1): (3, 16), ("low.fc/mlp", 0): (8, 16), ("low.fc/mlp", 1): (3, 16)})
    exact = sample(denoisers)
    with swapper.swapped(plan):  # fits the segment that `high` never runs in as well
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(sample(denoisers), exact, strict=True)]
    assert errors[0] > 0.05 and errors[1] > 0.05 and 0 < errors[2] < 0.02


class Backwards(nn.Module):
    """Told how clean its input is, under another name."""

    def forward(self, x: Tensor, t: Tensor) -> None:
        self.seen = self.context.noise_level


def test_timestep_scales() -> None:
    denoiser = Backwards()
    denoiser.context = StepContext((0, 1), {"at_noise": 0.0, "at_clean": 1.0, "argument": "t"})
    denoiser.context.attach(denoiser)
    denoiser(torch.zeros(1), torch.tensor([0.25]))
    assert denoiser.seen == 0.75
    with pytest.raises(UserError, match=r"timestep 1.5 lies outside \[1, 0\]"):
        denoiser(torch.zeros(1), torch.tensor([1.5]))
    with pytest.raises(UserError, match="without a timestep; pass t="):
        denoiser.context.set_timestep(None)
    with pytest.raises(UserError, match="both 1; they must differ"):
        TimestepScale.of({"at_noise": 1.0, "at_clean": 1.0})
    with pytest.raises(UserError, match="at_start"):
        TimestepScale.of({"at_start": 1.0})
