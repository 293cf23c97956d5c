"""PTQ4DM's thinned calibration rows and the range that is fitted to them."""

import math

import pytest
import torch

from viditq.errors import UserError
from viditq.quant import Chain, LpSearch, NormalSteps, QuantSpec
from viditq.quant.calibration.observer_bank import ObserverBank
from viditq.quant.calibration.segment_stats import SegmentStats
from viditq.quant.calibration.summary import summary_of
from viditq.quant.methods.ranges import static_grid

SPEC = QuantSpec(4, granularity="tensor")


@pytest.fixture
def stats() -> SegmentStats:
    """Ten buckets, 16 rows in each, all equal to the bucket's number + 1."""
    bank = ObserverBank(["layer"], 10, 3, 16)
    for bucket in range(10):
        rows = torch.full((1, 16, 3), bucket + 1.0)
        bank.update({("layer", bucket): summary_of(rows, torch.arange(16), torch.arange(16), bucket / 10)})
    return SegmentStats(bank.observers["layer"], list(range(10)))


@pytest.mark.parametrize(("mean", "deviation"), [(0.4, 0.5), (0.25, 0.1), (0.0, 0.2)])
def test_rows_follow_the_normal_distribution(stats: SegmentStats, mean: float, deviation: float) -> None:
    rows = NormalSteps(mean=mean, deviation=deviation).rows_of(stats)
    counts = [int((rows[:, 0] == bucket + 1).sum()) for bucket in range(10)]
    densities = [math.exp(-0.5 * ((bucket / 10 + 0.05 - mean) / deviation) ** 2) for bucket in range(10)]
    assert counts == [max(1, round(16 * d / max(densities))) for d in densities]


def test_all_rows_where_the_distribution_is_flat(stats: SegmentStats) -> None:
    assert torch.equal(NormalSteps(deviation=10.0).rows_of(stats), stats.rows)


def test_the_grid_is_the_search_on_these_rows_and_the_extremes(stats: SegmentStats) -> None:
    ranges = NormalSteps(mean=0.1, deviation=0.1)
    scale, zero_point = static_grid(Chain(), stats, SPEC, ranges, torch.empty(0))
    values = torch.cat([ranges.rows_of(stats), torch.tensor([[1.0], [10.0]]).expand(2, 3)])
    wanted = LpSearch(2.0).fit(values.reshape(1, -1), SPEC)
    assert (scale, zero_point) == tuple(part.flatten() for part in wanted)
    assert scale < static_grid(Chain(), stats, SPEC, LpSearch(2.0), torch.empty(0))[0]


@pytest.mark.parametrize("field", [{"mean": 0.6}, {"mean": -0.1}, {"deviation": 0.0}, {"p": 0}, {"mean": True}])
def test_refuses_what_is_no_such_distribution(field: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(field))):
        NormalSteps(**field)
