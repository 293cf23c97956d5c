"""Frechet distance against scipy, against a formula without covariances, and on singular sets."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file

from viditq.errors import UserError
from viditq.metrics.batch import EvalBatch
from viditq.metrics.frechet import FrechetDistance, distance_of_rows, frechet_distance

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "frechet.safetensors"


def by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    """The textbook formula, for full-rank sets."""
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b)
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root.real))


def by_features(a: np.ndarray, b: np.ndarray) -> float:
    """From centred features alone: tr (C_a C_b)^(1/2) is the nuclear norm of the scaled A B^T."""
    centred_a, centred_b = (x - x.mean(0) for x in (a, b))
    scaled_a, scaled_b = (x / np.sqrt(len(x) - 1) for x in (centred_a, centred_b))
    cross = np.linalg.svd(scaled_a @ scaled_b.T, compute_uv=False).sum()
    return float(
        np.square(a.mean(0) - b.mean(0)).sum() + np.square(scaled_a).sum() + np.square(scaled_b).sum() - 2 * cross
    )


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return frechet_distance(a, b).item()


def test_full_rank_golden_features_agree_with_scipy():
    golden = load_file(GOLDEN)
    a, b = golden["features_full_rank_a"], golden["features_full_rank_b"]
    assert distance(a, b) == pytest.approx(by_scipy(a.numpy(), b.numpy()), rel=1e-9)
    assert distance(a, b) == pytest.approx(by_features(a.numpy(), b.numpy()), rel=1e-9)


@pytest.mark.parametrize("kind", ["logits", "pooled"])
def test_singular_golden_features(kind):
    golden = load_file(GOLDEN)
    a, b = golden[f"{kind}_a"], golden[f"{kind}_b"]
    expected = by_features(a.double().numpy(), b.double().numpy())
    assert distance(a, b) == pytest.approx(expected, rel=1e-7)
    assert distance(a, a) == pytest.approx(0, abs=1e-9 * a.double().square().sum(1).mean().item())


def test_gaussians_of_known_distance():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    shift = torch.arange(6, dtype=torch.float64)
    assert distance(a, a + shift) == pytest.approx(shift.square().sum().item(), rel=1e-9)
    stretched = a.mean(0) + 3 * (a - a.mean(0))
    assert distance(a, stretched) == pytest.approx(4 * a.var(0).sum().item(), rel=1e-9)
    assert distance(a + 1000, stretched + 1000) == pytest.approx(4 * a.var(0).sum().item(), rel=1e-7)
    assert distance(torch.ones(3, 4), torch.ones(5, 4)) == pytest.approx(0, abs=1e-12)


def test_metric_streams_the_features_of_each_set(pairs, rows_of, tiny_features):
    batch = pairs(30)
    features = {k: tiny_features.features(getattr(batch, k) / 255).detach().double().numpy()
                for k in ("samples", "references", "data")}  # fmt: skip
    results = {}
    for against in ("reference", "data"):
        metric = FrechetDistance(tiny_features, against, "FVD")
        for rows in (range(7), range(7, 8), range(8, 30)):
            metric.update(rows_of(batch, list(rows)))
        results[against] = metric.compute()
    samples, references, data = features.values()
    assert results["reference"]["value"].item() == pytest.approx(by_scipy(samples, references), rel=1e-4)
    assert results["data"]["value"].item() == pytest.approx(by_scipy(samples, data), rel=1e-4)
    assert results["data"]["reference_value"].item() == pytest.approx(by_scipy(references, data), rel=1e-4)
    assert "reference_value" not in results["reference"] and "difference_error" not in results["reference"]
    assert all(r["standard_error"] > 0 for r in results.values()) and results["data"]["difference_error"] > 0


def test_sets_of_other_sizes_and_wide_features():
    generator = torch.Generator().manual_seed(1)
    for number, other, features in ((40, 90, 12), (9, 30, 12), (12, 12, 12), (5, 7, 300)):
        a, b = (torch.randn(n, features, generator=generator).relu() for n in (number, other))
        expected = by_features(a.double().numpy(), b.double().numpy())
        assert distance(a, b) == pytest.approx(expected, rel=1e-10)
        if min(number, other) > features:
            assert distance(a, b) == pytest.approx(by_scipy(a.double().numpy(), b.double().numpy()), rel=1e-8)
        # One set is a shifted copy of the other: nothing but the shift is left, in spite of a large mean.
        assert distance(a + 1e4, a.double() + 1e4 + 2) == pytest.approx(4 * features, rel=1e-2)


@pytest.mark.parametrize("features", [12, 100])
def test_subsets_share_their_product(features):
    generator = torch.Generator().manual_seed(1)
    a, b = (1000 + torch.randn(40, features, generator=generator, dtype=torch.float64) for _ in range(2))
    of_rows = distance_of_rows(a, b)
    for rows in (torch.arange(40), torch.arange(0, 40, 3), torch.tensor([5, 9])):
        assert of_rows(rows).item() == pytest.approx(distance(a[rows], b[rows]), rel=1e-9)


class AreFeatures(torch.nn.Module):
    """Clips of one row of pixels are their own features."""

    def features(self, clips_BFCHW: torch.Tensor) -> torch.Tensor:
        return clips_BFCHW.flatten(1)


def fresh_draw(number: int, features: int, generator: torch.Generator) -> EvalBatch:
    """References of the distribution of the data, samples close to them and a little off."""
    mix = torch.randn(features, features, generator=torch.Generator().manual_seed(0)) / features**0.5
    references, data = (torch.randn(number, features, generator=generator) @ mix for _ in range(2))
    samples = 1.2 * references + 0.3 * torch.randn(number, features, generator=generator) + 0.3
    clips = [(128 + 24 * x).round().clamp(0, 255).byte()[:, None, None, None] for x in (samples, references, data)]
    return EvalBatch(*clips[:2], ["p"] * number, torch.arange(number), clips[2])


@pytest.mark.parametrize(("features", "draws", "most"), [(8, 100, 1.5), (160, 25, 2.0)])
def test_errors_are_the_spread_over_fresh_draws(features, draws, most):
    """With fewer samples than features the jackknife errs to the safe side."""
    generator = torch.Generator().manual_seed(3)
    results = []
    for _ in range(draws):
        metric = FrechetDistance(AreFeatures(), "data", "FVD")
        metric.update(fresh_draw(128, features, generator))
        results.append(metric.compute())
    column = {key: torch.stack([r[key] for r in results]) for key in results[0]}
    spread = {
        "standard_error": column["value"].std(),
        "difference_error": (column["value"] - column["reference_value"]).std(),
    }
    for key, truth in spread.items():
        assert 1 / 1.5 < column[key].square().mean().sqrt() / truth < most, key


def test_order_and_batches_change_nothing(pairs, rows_of, tiny_features):
    results = []
    for order in (range(25), reversed(range(25))):
        metric = FrechetDistance(tiny_features, "data", "FVD")
        for row in order:
            metric.update(rows_of(pairs(25), [row]))
        results.append(metric.compute())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_few_prompts_have_a_value_and_no_error(pairs, tiny_features):
    for number in (2, 3):
        metric = FrechetDistance(tiny_features, "data", "FVD")
        metric.update(pairs(number))
        result = metric.compute()
        assert result["value"].isfinite() and result["reference_value"].isfinite()
        assert result["standard_error"].isnan() == result["difference_error"].isnan() == (number < 3)


def test_noise_and_frozen_motion_raise_it(pairs, tiny_features):
    def value(batch: EvalBatch) -> float:
        metric = FrechetDistance(tiny_features, "reference", "FVD")
        metric.update(batch)
        return metric.compute()["value"].item()

    values = [value(pairs(24, noise=noise)) for noise in (0.02, 0.1, 0.4)]
    assert values == sorted(values)
    batch = pairs(24, noise=0.02)
    frozen = batch.samples[:, :1].expand_as(batch.samples)
    assert value(EvalBatch(frozen, batch.references, batch.prompts, batch.index)) > 10 * values[0]


def test_refuses_with_the_remedy(pairs, tiny_features):
    with pytest.raises(UserError, match="reference, data"):
        FrechetDistance(tiny_features, "real", "FVD")
    batch = pairs(1)
    metric = FrechetDistance(tiny_features, "data", "FVD to data")
    with pytest.raises(UserError, match="has none"):
        metric.update(EvalBatch(batch.samples, batch.references, batch.prompts, batch.index))
    metric.update(batch)
    with pytest.raises(UserError, match="at least 2"):
        metric.compute()
