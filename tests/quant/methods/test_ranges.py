"""Every range against what it promises; the search against an exhaustive one, the fit against least squares."""

import pytest
import torch

from viditq.errors import UserError
from viditq.quant import (
    Chain,
    GridFit,
    LayerScheme,
    LpSearch,
    MinMax,
    Percentile,
    QuantSpec,
    RangeSpec,
    RotateSpec,
    Smooth,
)
from viditq.quant.calibration.observer_bank import ObserverBank
from viditq.quant.calibration.segment_stats import SegmentStats
from viditq.quant.calibration.summary import summary_of
from viditq.quant.description.registry import RANGES
from viditq.quant.methods.quantizer import dequantize_weight, quantize_weight, weight_grid
from viditq.quant.methods.ranges import static_grid
from viditq.quant.methods.ranges.grid_fit import STARTS, least_squares_grid
from viditq.quant.methods.ranges.search import CHUNK, best_shrunk, error_sums
from viditq.quant.numerics.affine import fake_quantize, quantize

SPECS = [QuantSpec(b, s, g, k) for b in (2, 4) for s in (False, True) for g, k in [("channel", None), ("group", 16)]]
SPECS += [QuantSpec(4, granularity="tensor"), QuantSpec(8, True, "tensor")]


@pytest.fixture
def weight() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.distributions.StudentT(3.0).sample((12, 64)) * 0.1


def squared_error(weight: torch.Tensor, spec: QuantSpec, grid) -> float:
    return float((dequantize_weight(quantize_weight(weight, spec, grid), spec) - weight).square().sum())


@pytest.mark.parametrize("spec", SPECS)
def test_min_max_is_the_default_grid(weight, spec):
    grid, default = weight_grid(weight, spec, MinMax()), quantize_weight(weight, spec)
    assert torch.equal(grid[0], default.scale)
    assert torch.equal(quantize_weight(weight, spec, grid).codes, default.codes)


@pytest.mark.parametrize("name", RANGES.names())
@pytest.mark.parametrize("spec", SPECS)
def test_every_range_gives_a_grid_that_can_be_stored(weight, name, spec):
    weight[3] = 0
    scale, zero_point = weight_grid(weight, spec, RangeSpec.parse(name))
    assert scale.shape == zero_point.shape == quantize_weight(weight, spec).scale.shape
    assert (scale > 0).all() and torch.isfinite(scale).all()
    assert torch.equal(zero_point, zero_point.round())
    assert (zero_point >= 0).all() and (zero_point <= (0 if spec.symmetric else 2**spec.bits - 1)).all()


@pytest.mark.parametrize("p", [2, 2.4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_lp_search_is_the_exhaustive_one(weight, p, symmetric):
    scale, _ = weight_grid(weight, QuantSpec(4, symmetric, "channel"), LpSearch(p, 80))
    for row, found in zip(weight.double(), scale, strict=True):
        errors = {}
        for i in range(80):
            lo, hi = (min(float(row.min()), 0) * (1 - i / 100), max(float(row.max()), 0) * (1 - i / 100))
            s = max(-lo, hi) / 7 if symmetric else (hi - lo) / 15
            zero, low, high = (0, -8, 7) if symmetric else (round(-lo / s), 0, 15)
            back = [(min(max(round(float(v) / s) + zero, low), high) - zero) * s for v in row]
            errors[s] = sum(abs(b - float(v)) ** p for b, v in zip(back, row, strict=True))
        assert errors[min(errors, key=lambda s: abs(s - float(found)))] <= min(errors.values()) * (1 + 1e-4)


@pytest.mark.parametrize("name", ["lp", "grid_fit"])
@pytest.mark.parametrize("spec", SPECS)
def test_searched_grids_beat_min_max(weight, name, spec):
    ranges = LpSearch(2) if name == "lp" else GridFit()
    ours, plain = (squared_error(weight, spec, weight_grid(weight, spec, r)) for r in (ranges, MinMax()))
    assert ours <= plain
    assert ours < 0.95 * plain or spec.bits == 8


def test_grid_fit_beats_the_search_it_starts_from(weight):
    spec = QuantSpec(4, granularity="channel")
    fitted = squared_error(weight, spec, weight_grid(weight, spec, GridFit()))
    assert fitted < 0.995 * squared_error(weight, spec, best_shrunk(weight, spec, STARTS, 2))


def test_the_least_squares_step_is_least_squares(weight):
    """Without the rounding of the zero point it must equal lstsq; with it, no other integer does better."""
    spec = QuantSpec(4, granularity="channel")
    scale, zero_point = weight_grid(weight, spec, MinMax())
    codes = quantize(weight, scale, zero_point, 4, False).float()
    found_scale, found_zero = least_squares_grid(weight, codes, spec)
    for row, q, s, z in zip(weight.double(), codes.double(), found_scale, found_zero, strict=True):
        errors = {}
        for integer in range(16):
            slope = torch.linalg.lstsq((q - integer)[:, None], row[:, None]).solution
            errors[integer] = (float(((q - integer) * slope[0, 0] - row).square().sum()), float(slope[0, 0]))
        joint = torch.linalg.lstsq(torch.stack([q, torch.ones_like(q)], 1), row[:, None]).solution[:, 0]
        assert round(float(-joint[1] / joint[0])) == int(z)
        assert errors[int(z)][1] == pytest.approx(float(s), rel=1e-4)


def test_percentile_is_the_nearest_rank():
    values = torch.arange(1000.0)[torch.randperm(1000)][None] - 200
    spec = QuantSpec(8)
    scale, zero_point = Percentile(99.9).fit(values, spec)
    lo, hi = -199.0, 798.0  # the second smallest and the second largest
    assert float(scale) == pytest.approx((hi - lo) / 255) and float(zero_point) == round(-lo / float(scale))
    assert torch.equal(torch.cat(Percentile(100).fit(values, spec)), torch.cat(MinMax().fit(values, spec)))


def test_long_rows_are_searched_in_parts():
    values = torch.randn(1, CHUNK + 77)
    scale, zero = torch.tensor([[0.3]]), torch.tensor([[7.0]])
    want = (fake_quantize(values, scale, zero, 4, False) - values).abs().pow(2.4).double().sum()
    torch.testing.assert_close(error_sums(values, scale, zero, QuantSpec(4), 2.4)[0, 0], want, rtol=1e-6, atol=0)


def stats_of(x: torch.Tensor, num_rows: int = 64) -> SegmentStats:
    bank = ObserverBank(["layer"], 1, x.shape[-1], num_rows)
    count = x.shape[0] * x.shape[1]
    bank.update({("layer", 0): summary_of(x, torch.arange(count), torch.arange(count), 0.5)})
    return SegmentStats(bank.observers["layer"], [0])


STATIC = [QuantSpec(8), QuantSpec(8, True, "channel"), QuantSpec(6, False, "group", 16)]


@pytest.mark.parametrize("spec", STATIC)
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("name", RANGES.names())
def test_static_activations(spec, rotated, name):
    """All rows are kept here, so that a grid from rows is the one from everything."""
    torch.manual_seed(0)
    x = torch.randn(4, 16, 32) * torch.logspace(-1, 1, 32)
    chain = Chain([Smooth(torch.rand(32) + 0.5)])
    if rotated:
        chain.append(RotateSpec().fit(torch.zeros(1, 32), None, None))
    scale, zero_point = static_grid(chain, stats_of(x), spec, RangeSpec.parse(name), x)
    y = chain.activation(x)
    shape = {"tensor": (1,), "channel": (32,), "group": (2, 1)}[spec.granularity]
    assert scale.shape == zero_point.shape == shape
    view = y if spec.group_size is None else y.unflatten(-1, (-1, 16))
    back = fake_quantize(view, scale, zero_point, spec.bits, spec.symmetric)
    if name == "min_max":
        assert ((back - view).abs() <= scale / 2 * 1.01 + (scale / 2 if not spec.symmetric else 0)).all()
    assert float((back - view).norm() / view.norm()) < 0.1


def test_extremes_count_beside_the_kept_rows_unless_channels_mix():
    x = torch.randn(4, 16, 32)
    x[3, 15, 4] = 100
    few = stats_of(x, 8)
    plain = static_grid(Chain(), few, QuantSpec(8, True), MinMax(), x)[0]
    assert float(plain) == pytest.approx(100 / 127)
    assert float(static_grid(Chain(), few, QuantSpec(8, True), Percentile(), x)[0]) < 5 / 127
    for searched in (LpSearch(), GridFit()):  # cutting it off would be an error of 95
        assert 90 / 127 < float(static_grid(Chain(), few, QuantSpec(8, True), searched, x)[0]) <= 101 / 127
    rotated = Chain([RotateSpec().fit(torch.zeros(1, 32), None, None)])
    assert float(static_grid(rotated, few, QuantSpec(8, True), LpSearch(), x)[0]) < 5 / 127


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Percentile(50), "percentile=50 is not possible"),
        (lambda: LpSearch(0), "p=0 is not possible"),
        (lambda: LpSearch(2, 100), "num_shrinks=100 is not possible"),
        (lambda: GridFit(0), "iterations=0 is not possible"),
        (lambda: LayerScheme(QuantSpec(4), None, ranges="min_mix"), "unknown range 'min_mix'; close names: min_max"),
        (lambda: RangeSpec.from_dict({"name": "lp", "q": 2}), "range lp has no field 'q'"),
        (lambda: RangeSpec.from_dict(3), "a range must be a mapping with a 'name'"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(UserError, match=message):
        make()
