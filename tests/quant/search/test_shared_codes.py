"""Which layers get codes for each segment: decided by their outputs' errors, and what comes of it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.quant import (
    CalibrationStats,
    Calibrator,
    LayerScheme,
    QuantPlan,
    QuantSpec,
    Recipe,
    RotateSpec,
    SmoothSpec,
    load_denoiser,
    quantize_denoiser,
    save_denoiser,
    size_bytes,
)
from viditq.quant.execution.linear import quant_linears
from viditq.quant.search.shared_codes import SharedCodes, share_codes

W8, W4 = QuantSpec(8, granularity="channel"), QuantSpec(4, granularity="channel")
A6, A8 = (QuantSpec(bits, granularity="token", dynamic=True) for bits in (6, 8))
OPEN = SmoothSpec(0.5, per_segment=True, aggregate="max", min_gain=0.1)
SEGMENTS = (0.0, 0.5, 1.0)
LAYERS = ["moving", "still"]
LOUD = 20.0


class Moving(nn.Module):
    """Of what `moving` reads channels 0 to 3 are loud where noise is high, 4 to 7 where it is low."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.moving, self.still = (nn.Linear(16, 12, bias=False) for _ in LAYERS)
        for layer in (self.moving, self.still):
            layer.weight.data = torch.randn(12, 16, generator=generator)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        gains = torch.ones(16)
        gains[slice(0, 4) if float(timestep[0]) > 500 else slice(4, 8)] = LOUD
        out: Tensor = self.moving(x * gains) + self.still(x)
        return out


@pytest.fixture(scope="module")
def stats() -> CalibrationStats:
    model = Moving()
    with Calibrator(model, LAYERS) as calibrator, torch.no_grad():
        calibrator.set_sample_seeds([0, 1])
        for t in (900, 700, 300, 100):
            model(torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(t)), torch.full((2,), t))
    return calibrator.stats


def decided(stats: CalibrationStats, smoothing: SmoothSpec = OPEN, activation: QuantSpec = A6) -> SharedCodes:
    return share_codes(Moving(), Recipe(W8, activation, smoothing, segments=SEGMENTS).resolve(LAYERS), stats)


def test_layers_whose_channels_move_get_codes_for_each_segment(stats: CalibrationStats) -> None:
    found = decided(stats)
    assert found.shared == ["still"] and found.gains["moving"] > 0.1 > found.gains["still"]
    assert not found.plan.open_layers
    settled = [found.plan.scheme(layer, segment) for layer in LAYERS for segment in (0, 1)]
    own, static = (replace(OPEN, per_segment=p, min_gain=None) for p in (True, False))
    assert [scheme.transforms for scheme in settled if scheme] == [(own,), (own,), (static,), (static,)]


def test_the_gain_is_that_of_the_outputs_error(stats: CalibrationStats) -> None:
    """Computed anew by quantizing the model with either kind of scales."""
    errors = []
    for per_segment in (True, False):
        model = Moving()
        plan = Recipe(W8, A6, SmoothSpec(0.5, per_segment, "max"), segments=SEGMENTS).resolve(LAYERS)
        context = quantize_denoiser(model, plan, stats)
        relative = []
        for segment in (0, 1):
            rows, context.segment = stats.segment("moving", *SEGMENTS[segment : segment + 2]).rows, segment
            exact, got = Moving().moving(rows), model.moving(rows[None])[0]
            relative.append(((got - exact).square().sum() / exact.square().sum()).item())
        errors.append(sum(relative) / 2)
    assert decided(stats).gains["moving"] == pytest.approx(1 - errors[0] / errors[1], rel=1e-3)


@pytest.mark.parametrize("min_gain, shared", [(0.0, []), (1.0, LAYERS)])
def test_the_threshold_is_obeyed(stats: CalibrationStats, min_gain: float, shared: list[str]) -> None:
    found = decided(stats, replace(OPEN, min_gain=min_gain))
    assert [layer for layer in LAYERS if found.gains[layer] < min_gain] == found.shared
    assert found.shared == (shared or found.shared)


def test_one_set_of_codes_takes_the_better_of_two_alphas(stats: CalibrationStats) -> None:
    """With 8-bit activations and 4-bit weights, alpha 0.9 moves outliers into the weights."""
    recipe = Recipe(W4, A8, replace(OPEN, alpha=(0.9, 0.2), min_gain=1.0), segments=SEGMENTS)
    plan = share_codes(Moving(), recipe.resolve(LAYERS), stats).plan
    chosen = {
        t.alpha for names in plan.layers.values() for name in names if name for t in plan.schemes[name].transforms
    }
    assert chosen == {0.2}
    assert all(len({*names}) == 1 for names in plan.layers.values())


def test_a_rotation_behind_is_kept_and_other_bits_in_a_segment_stay(stats: CalibrationStats) -> None:
    plan = Recipe(W8, A6, [replace(OPEN, min_gain=1.0), RotateSpec(3)], segments=SEGMENTS).resolve(LAYERS)
    narrow = LayerScheme(W4, A6, plan.schemes[str(plan.layers["moving"][0])].transforms)
    wide = plan.layers["moving"][0]
    mixed = QuantPlan(plan.edges, plan.schemes | {"narrow": narrow}, plan.layers | {"moving": ("narrow", wide)})
    found = share_codes(Moving(), mixed, stats)
    assert found.shared == ["still"] and found.plan.layers["moving"] == ("narrow", wide)
    scheme = found.plan.scheme("still", 0)
    assert scheme is not None and scheme.transforms[1] == RotateSpec(3)
    assert not found.plan.open_layers


def test_artifacts_are_smaller_and_load_as_they_were(stats: CalibrationStats, tmp_path: Path) -> None:
    x, sizes = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(7)), []
    for min_gain in (0.1, None):
        model, plan = Moving(), Recipe(W8, A6, replace(OPEN, min_gain=min_gain), segments=SEGMENTS).resolve(LAYERS)
        plan = share_codes(model, plan, stats).plan
        quantize_denoiser(model, plan, stats)
        folder = tmp_path / str(min_gain)
        save_denoiser(folder, model, plan, {})
        sizes.append(size_bytes(folder))
        loaded, read, _, _ = load_denoiser(folder, Moving)
        assert read == plan and "min_gain" not in (folder / "plan.json").read_text()
        for t in (100, 900):
            assert torch.equal(loaded(x, torch.full((2,), t)), model(x, torch.full((2,), t)))
        counts = [len(layer.variants) for layer in quant_linears(model).values()]
        assert counts == ([2, 1] if min_gain else [2, 2])
    assert sizes[0] < sizes[1]


def test_the_same_statistics_give_the_same_plan(stats: CalibrationStats) -> None:
    again = CalibrationStats.from_tensors(stats.to_tensors())
    assert decided(stats) == decided(again)


def test_a_plan_that_is_open_is_not_quantized_by(stats: CalibrationStats) -> None:
    plan = Recipe(W8, A6, OPEN, segments=SEGMENTS).resolve(LAYERS)
    assert QuantPlan.from_json(plan.to_json()) == plan and plan.open_layers == LAYERS
    with pytest.raises(UserError, match=r"leaves open whether moving .* let .*share_codes"):
        quantize_denoiser(Moving(), plan, stats)


@pytest.mark.parametrize("min_gain", [-0.1, 1.5, "auto", True])
def test_thresholds_that_are_none(min_gain: object) -> None:
    with pytest.raises(UserError, match=r"min_gain=.* give a number in \[0, 1\], or null"):
        replace(OPEN, min_gain=min_gain)
    with pytest.raises(UserError, match=r"min_gain=0\.1 changes nothing here"):
        SmoothSpec(0.5, min_gain=0.1)
