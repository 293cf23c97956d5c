"""The intervals hold what they promise, and agree with scipy."""

import pytest
import torch
from scipy import stats

from viditq.metrics import bootstrap
from viditq.metrics.bootstrap import MIN_PROMPTS, bootstrap_interval, normal_interval, t_quantile, tail


def draw(count: int, number: int, skewed: bool = False) -> torch.Tensor:
    """`number` sets of mean 0, [number, count]."""
    generator = torch.Generator().manual_seed(number)
    normal = torch.randn(number, count, generator=generator, dtype=torch.float64)
    return normal.exp() - torch.tensor(0.5).exp() if skewed else normal


def coverage(values: torch.Tensor, num_resamples: int = 1000) -> float:
    bounds = [bootstrap_interval(row, num_resamples, seed) for seed, row in enumerate(values)]
    return sum(low <= 0 <= high for low, high in bounds) / len(bounds)


def test_coverage_at_64_prompts():
    assert 0.92 <= coverage(draw(64, 400)) <= 0.98


def test_coverage_with_few_or_skewed_scores():
    assert 0.88 <= coverage(draw(8, 400)) <= 0.98  # uncorrected percentiles: 0.85 to 0.89
    assert 0.88 <= coverage(draw(64, 400, skewed=True)) <= 0.98


@pytest.mark.parametrize("count", [8, 32, 128])
def test_agrees_with_scipy(count):
    values = draw(count, 1, skewed=True)[0]
    expected = stats.bootstrap(
        (values.numpy(),),
        lambda x, axis: x.mean(axis),
        n_resamples=20_000,
        confidence_level=1 - 2 * tail(count),
        method="percentile",
        random_state=0,
    ).confidence_interval
    width = expected.high - expected.low
    assert bootstrap_interval(values, 20_000) == pytest.approx(tuple(expected), abs=0.05 * width)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 31, 1000])
def test_quantile_of_student(freedom):
    assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-2 if freedom < 6 else 1e-3)


def test_order_and_pieces_do_not_matter(monkeypatch):
    values = draw(50, 1)[0]
    whole = bootstrap_interval(values)
    assert bootstrap_interval(values[torch.randperm(50)]) == whole
    assert bootstrap_interval(values, seed=1) != whole
    monkeypatch.setattr(bootstrap, "CHUNK", 1000)
    assert bootstrap_interval(values) == pytest.approx(whole, abs=0.02)
    assert bootstrap_interval(values + 10, seed=0) == pytest.approx([x + 10 for x in bootstrap_interval(values)])


def test_no_interval_from_too_few_or_undefined_scores():
    assert bootstrap_interval(torch.ones(1)) is None
    assert bootstrap_interval(draw(MIN_PROMPTS - 1, 1)[0]) is None
    assert bootstrap_interval(draw(MIN_PROMPTS, 1)[0]) is not None
    assert bootstrap_interval(torch.tensor([torch.nan, *range(9)])) is None
    assert bootstrap_interval(torch.full((9,), 2.5)) == (2.5, 2.5)
    assert normal_interval(1.0, torch.nan) is None
    assert normal_interval(1.0, 0.5) == pytest.approx((0.02, 1.98), abs=1e-3)
