"""Frechet distance against scipy, against a formula without covariances, and on singular sets."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file

from viditq.errors import UserError
from viditq.metrics.batch import EvalBatch
from viditq.metrics.frechet import FrechetDistance, frechet_distance, moments

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
    return frechet_distance(moments(a), moments(b)).item()


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
    assert results["reference"]["standard_error"].isnan() and "reference_value" not in results["reference"]


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
