"""The suite runs over every registered transform; `random_transform` says how to make one of each."""

import pytest
import torch
import torch.nn.functional as F

from viditq.errors import UserError
from viditq.quant import Chain, LayerScheme, QuantSpec, Smooth, SmoothSpec, Transform
from viditq.quant.calibration.observer_bank import ObserverBank
from viditq.quant.calibration.segment_stats import SegmentStats
from viditq.quant.calibration.summary import summary_of
from viditq.quant.description.registry import TRANSFORMS
from viditq.quant.methods.transforms.smooth import AUTO_ALPHAS, _output_error, smooth_scale

W4A8 = LayerScheme(QuantSpec(4, granularity="channel"), QuantSpec(8, granularity="token", dynamic=True))
STATIC = LayerScheme(QuantSpec(4, granularity="channel"), QuantSpec(8))


def stats_of(x_LNC: torch.Tensor, num_rows: int = 64) -> SegmentStats:
    bank = ObserverBank(["layer"], 1, x_LNC.shape[-1], num_rows)
    count = x_LNC.shape[0] * x_LNC.shape[1]
    bank.update({("layer", 0): summary_of(x_LNC, torch.arange(count), torch.arange(count), 0.5)})
    return SegmentStats(bank.observers["layer"], [0])


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(4, 16, 32) * torch.logspace(-1, 1.5, 32)
    return x, torch.randn(24, 32)


def random_transform(name: str, weight: torch.Tensor, stats: SegmentStats) -> Transform:
    if name == "given_scale":
        return Smooth(torch.rand(weight.shape[1]) + 0.5)
    return TRANSFORMS.get(name)().fit(weight, stats, W4A8)


def test_a_given_scale_is_never_fitted(problem):
    x, weight = problem
    with pytest.raises(UserError, match=r"cannot be made anew.*quant/policy=artifact"):
        TRANSFORMS.get("given_scale")().fit(weight, stats_of(x), W4A8)


@pytest.mark.parametrize("names", [[], *([name] for name in TRANSFORMS.names()), TRANSFORMS.names() * 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_chain_does_not_change_the_output(problem, names, dtype):
    x, weight = problem
    chain = Chain([random_transform(name, weight, stats_of(x)) for name in names]).to(dtype)
    x, weight = x.to(dtype), weight.to(dtype)
    kept = x.clone()
    y = F.linear(chain.activation(x), chain.weight(weight))
    torch.testing.assert_close(y, F.linear(x, weight), rtol=1e-4, atol=4e-2 if dtype == torch.float32 else 1e-9)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("name", TRANSFORMS.names())
def test_bounds_hold_and_the_empty_one_has_the_same_tensors(problem, name):
    x, weight = problem
    transform = random_transform(name, weight, stats_of(x))
    y = transform.activation(x)
    bounds = transform.bounds(x.amin((0, 1)), x.amax((0, 1)))
    assert (bounds is None) == (name in ("rotate", "convrot"))
    if bounds is not None:
        assert (y >= bounds[0] - 1e-5).all() and (y <= bounds[1] + 1e-5).all()
    empty = TRANSFORMS.get(name)().empty(32)
    shapes = [{k: (v.shape, v.dtype) for k, v in t.state_dict().items()} for t in (empty, transform)]
    assert shapes[0] == shapes[1]
    assert all(v.is_meta for v in empty.state_dict().values())


@pytest.mark.parametrize("alpha", [0.0, 0.11, 0.5, 1.0])
@pytest.mark.parametrize("aggregate", ["ema", "max", "percentile"])
def test_smooth_is_the_formula(problem, alpha, aggregate):
    x, weight = problem
    stats = stats_of(x)
    smooth = SmoothSpec(alpha, aggregate=aggregate).fit(weight, stats, W4A8)
    want = stats.amax(aggregate).double() ** alpha / weight.abs().amax(0).double() ** (1 - alpha)
    torch.testing.assert_close(smooth.scale.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, "auto"])
def test_dead_channels_and_columns_stay_finite(problem, alpha):
    x, weight = problem
    x[..., 3], weight[:, 5] = 0, 0
    scale = SmoothSpec(alpha).fit(weight, stats_of(x), W4A8).scale
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert scale[3] == scale[5] == 1


def test_extreme_magnitudes_stay_finite():
    tiny, huge = torch.tensor([1e-38, 1e38, 1e38]), torch.tensor([1e38, 1e-38, 0.0])
    for alpha in (0.0, 0.5, 1.0):
        scale = smooth_scale(tiny, huge, alpha)
        assert torch.isfinite(scale).all() and (scale > 0).all()


@pytest.mark.parametrize("scheme", [W4A8, STATIC, LayerScheme(W4A8.weight, None), LayerScheme(None, W4A8.activation)])
def test_auto_alpha_is_the_best_of_the_grid(problem, scheme):
    x, weight = problem
    stats = stats_of(x)
    chosen = SmoothSpec("auto").fit(weight, stats, scheme)
    errors = [_output_error(SmoothSpec(a).fit(weight, stats, scheme), weight, stats, scheme) for a in AUTO_ALPHAS]
    assert _output_error(chosen, weight, stats, scheme) == min(errors)
    identity = _output_error(Smooth(torch.ones(32)), weight, stats, scheme)
    assert min(errors) <= identity or scheme.activation is None


def test_smoothing_helps_where_it_should(problem):
    """Loud input channels on a coarse activation grid: balancing must cut the error by half at least."""
    x, weight = problem
    scheme = LayerScheme(QuantSpec(8, granularity="channel"), QuantSpec(4, granularity="token", dynamic=True))
    stats = stats_of(x)
    smooth = SmoothSpec(0.5).fit(weight, stats, scheme)
    assert _output_error(smooth, weight, stats, scheme) < 0.5 * _output_error(
        Smooth(torch.ones(32)), weight, stats, scheme
    )
