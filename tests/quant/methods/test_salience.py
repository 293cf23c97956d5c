"""PTQ4DiT's weighting against scipy's rank correlation and the paper's formulas, element by element."""

import math

import pytest
import torch
from scipy.stats import rankdata, spearmanr

from viditq.quant import LayerScheme, QuantSpec, SalienceSpec
from viditq.quant.calibration.observer_bank import ObserverBank
from viditq.quant.calibration.segment_stats import SegmentStats
from viditq.quant.calibration.summary import summary_of
from viditq.quant.methods.transforms.salience import ranks, spearman, weighted_salience

SCHEME = LayerScheme(QuantSpec(4, granularity="channel"), None, (SalienceSpec(),))


@pytest.fixture
def stats() -> SegmentStats:
    """Three observed buckets of five; which channels are loud moves with the noise level."""
    torch.manual_seed(0)
    bank = ObserverBank(["layer"], 5, 12, 4)
    for bucket in (0, 2, 4):
        x_LNC = torch.randn(2, 6, 12) * torch.linspace(0.1, 3, 12).roll(bucket * 2)
        bank.update({("layer", bucket): summary_of(x_LNC, torch.arange(2), torch.arange(2), bucket / 5)})
    return SegmentStats(bank.observers["layer"], [0, 2, 4])


def test_ranks_and_correlation_are_scipys() -> None:
    torch.manual_seed(1)
    one, two = torch.randn(200).mul(3).round(), torch.randn(200).mul(3).round()  # many ties
    assert ranks(one).tolist() == rankdata(one.numpy()).tolist()
    assert float(spearman(one, two)) == pytest.approx(spearmanr(one.numpy(), two.numpy()).statistic, abs=1e-12)
    assert float(spearman(one, torch.ones(200))) == 0.0


def test_balancing_is_the_formula(stats: SegmentStats) -> None:
    weight = torch.randn(7, 12) * torch.linspace(2, 0.2, 12)
    of_weight = [float(weight[:, c].abs().max()) for c in range(12)]
    of_inputs = stats.bucket_amax.tolist()
    shares = [math.exp(-spearmanr(amax, of_weight).statistic) for amax in of_inputs]
    salience = [sum(s * amax[c] for s, amax in zip(shares, of_inputs, strict=True)) / sum(shares) for c in range(12)]
    smooth = SalienceSpec().fit(weight, stats, SCHEME)
    wanted = [math.sqrt(x / w) for x, w in zip(salience, of_weight, strict=True)]
    assert smooth.scale.tolist() == pytest.approx(wanted, rel=1e-5)
    balanced = smooth.weight(weight).abs().amax(0).tolist()
    assert balanced == pytest.approx([math.sqrt(x * w) for x, w in zip(salience, of_weight, strict=True)], rel=1e-5)


def test_levels_that_complement_the_weight_count_more() -> None:
    weight = torch.tensor([1.0, 2.0, 3.0])
    along, against = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, 1.0])
    found = weighted_salience(torch.stack([along, against]), weight)
    share = math.exp(1) / (math.exp(1) + math.exp(-1))
    assert found.tolist() == pytest.approx(((1 - share) * along + share * against).tolist())


def test_bucket_amax_leaves_out_empty_buckets(stats: SegmentStats) -> None:
    assert stats.bucket_amax.shape == (3, 12) and torch.isfinite(stats.bucket_amax).all()
    assert torch.equal(stats.bucket_amax.amax(0), stats.amax("max"))
