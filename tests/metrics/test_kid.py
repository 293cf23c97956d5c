"""Kernel distance against a plain double sum and torchmetrics' own, and its error against fresh draws."""

import pytest
import torch
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from viditq.errors import UserError
from viditq.metrics.batch import EvalBatch
from viditq.metrics.kid import KernelDistance, KernelSums
from viditq.metrics.verdict import few_samples


def features_of(number: int, features: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return shift + torch.randn(number, features, generator=generator, dtype=torch.float64)


def by_hand(a: Tensor, b: Tensor) -> float:
    """One term at a time."""

    def kernel(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / len(x) + 1) ** 3

    pairs = [(i, j) for i in range(len(a)) for j in range(len(a)) if i != j]
    terms = [
        kernel(a[i], a[j]) + kernel(b[i], b[j]) - kernel(a[i], b[j]) - kernel(a[j], b[i]) for i, j in pairs
    ]  # fmt: skip
    return sum(terms) / len(pairs)


@pytest.mark.parametrize("number", [3, 11, 20, 31])
def test_sums_of_groups_are_a_plain_double_sum(number, monkeypatch):
    monkeypatch.setattr("viditq.metrics.kid.ROWS_AT_ONCE", 7)
    a, b = features_of(number, 5, 0), features_of(number, 5, 1, 0.3)
    sums, rows = KernelSums(a, b, min(5, number)), torch.arange(number)
    assert sums(rows).item() == pytest.approx(by_hand(a, b), rel=1e-10)
    if number > 5:
        kept = rows[rows % 5 != 2]
        assert sums(kept).item() == pytest.approx(by_hand(a[kept], b[kept]), rel=1e-10)
    assert KernelSums(a, a, 2)(rows) == pytest.approx(0, abs=1e-12)


def test_is_that_of_torchmetrics_but_for_equal_rows(pairs, tiny_features):
    batch = pairs(30)
    samples, data = (tiny_features.features(x / 255).double() for x in (batch.samples, batch.data))
    metric = KernelDistance(tiny_features, "data", "KID")
    metric.update(batch)
    result = metric.compute()
    equal_rows = ((samples * data).sum(1) / samples.shape[1] + 1) ** 3
    everything = ((samples @ data.T / samples.shape[1] + 1) ** 3).sum()
    moved = 2 * everything / 30**2 - 2 * (everything - equal_rows.sum()) / (30 * 29)
    expected = 1000 * (poly_mmd(data, samples) + moved)
    assert result["value"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert set(result) == {"value", "standard_error", "reference_value", "difference_error", "unbiased"}
    assert metric.unit == "x 1e-3" and few_samples(result, 5) is None


class AreFeatures(torch.nn.Module):
    """Clips of one row of pixels are their own features."""

    def features(self, clips_BFCHW: Tensor) -> Tensor:
        return 4 * clips_BFCHW.flatten(1) - 2


@pytest.mark.parametrize(("shift", "least", "most"), [(0.4, 1 / 1.5, 1.5), (0.0, 1.0, 1.8)])
def test_errors_are_the_spread_over_fresh_draws(shift, least, most):
    """Of equal distributions, where the value is 0 on average, the jackknife errs to the safe side by the root of 2."""
    generator, results = torch.Generator().manual_seed(3), []
    for _ in range(80):
        samples, references, data = (torch.randn(60, 8, generator=generator) for _ in range(3))
        sets = (samples + shift, references, data)
        clips = [(128 + 24 * x).round().clamp(0, 255).byte()[:, None, None, None] for x in sets]
        metric = KernelDistance(AreFeatures(), "data", "KID")
        metric.update(EvalBatch(*clips[:2], ["p"] * 60, torch.arange(60), clips[2]))
        results.append(metric.compute())
    column = {key: torch.stack([r[key] for r in results]) for key in results[0]}
    unshifted = column["reference_value"]
    assert abs(unshifted.mean()) < 3 * unshifted.std() / len(unshifted) ** 0.5
    spread = {"standard_error": column["value"], "difference_error": column["value"] - column["reference_value"]}
    for key, values in spread.items():
        assert least < column[key].square().mean().sqrt() / values.std() < most, key


def test_few_prompts_are_refused(pairs, tiny_features):
    metric = KernelDistance(tiny_features, "reference", "KID")
    metric.update(pairs(2))
    with pytest.raises(UserError, match="at least 3 prompts"):
        metric.compute()
