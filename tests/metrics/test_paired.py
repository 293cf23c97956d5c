"""Paired metrics against scikit-image and numpy, and what they must notice."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from viditq.errors import UserError
from viditq.metrics.batch import EvalBatch
from viditq.metrics.paired import Paired, RelativeL2


def psnr(**options: object) -> Paired:
    return Paired(PeakSignalNoiseRatio(data_range=1.0), "PSNR", "dB", **options)


def ssim() -> Paired:
    return Paired(StructuralSimilarityIndexMeasure(data_range=1.0), "SSIM")


def result_of(metric, *batches: EvalBatch) -> dict[str, torch.Tensor]:
    for batch in batches:
        metric.update(batch)
    return metric.compute()


def by_index(batch: EvalBatch, values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[batch.index.argsort()]


def test_psnr_is_that_of_scikit_image(pairs):
    batch = pairs(5)
    arrays = zip(batch.references.numpy(), batch.samples.numpy(), strict=True)
    expected = by_index(batch, [peak_signal_noise_ratio(r, s, data_range=255) for r, s in arrays])
    result = result_of(psnr(), batch)
    torch.testing.assert_close(result["per_sample"], expected, rtol=1e-5, atol=1e-5)
    assert result["index"].tolist() == sorted(batch.index.tolist())
    assert result["value"] == pytest.approx(expected.mean().item(), rel=1e-6)
    assert result["standard_error"] == pytest.approx(np.std(expected.numpy(), ddof=1) / np.sqrt(5), rel=1e-4)


def test_ssim_is_that_of_scikit_image(pairs):
    batch = pairs(3, frames=2)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    # torchmetrics scores the border as well, on the mirrored image; scikit-image where its window fits.
    mirror = [(0, 0)] * 3 + [(5, 5)] * 2
    s_BFCHW, r_BFCHW = (np.pad(x.numpy(), mirror, mode="reflect") for x in (batch.samples, batch.references))
    frames = [
        np.mean([structural_similarity(a, b, channel_axis=0, **settings) for a, b in zip(s, r, strict=True)])
        for s, r in zip(s_BFCHW, r_BFCHW, strict=True)
    ]
    result = result_of(ssim(), batch)
    torch.testing.assert_close(result["per_sample"], by_index(batch, frames), rtol=1e-4, atol=1e-4)


def test_relative_l2_is_the_formula(pairs):
    batch = pairs(4)
    s, r = (x.numpy().astype(np.float64).reshape(4, -1) / 255 for x in (batch.samples, batch.references))
    expected = by_index(batch, list(np.linalg.norm(s - r, axis=1) / np.linalg.norm(r, axis=1)))
    torch.testing.assert_close(result_of(RelativeL2("l2"), batch)["per_sample"], expected, rtol=1e-5, atol=0)


def test_more_noise_is_worse(pairs):
    for metric, worse in ((psnr, -1), (ssim, -1), (lambda: RelativeL2("l2"), 1)):
        values = [result_of(metric(), pairs(3, noise=noise))["value"].item() for noise in (0.01, 0.03, 0.1)]
        assert values == sorted(values, reverse=worse < 0), metric
        assert metric().higher_is_better is (worse < 0)


def test_identical_clips_are_finite(pairs):
    batch = pairs(3)
    same = EvalBatch(batch.references, batch.references, batch.prompts, batch.index)
    assert result_of(psnr(ceiling=100.0), same)["value"] == 100
    assert result_of(ssim(), same)["value"] == pytest.approx(1)
    assert result_of(RelativeL2("l2"), same)["value"] == 0
    with pytest.raises(UserError, match="ceiling"):
        result_of(psnr(), same)


def test_the_ceiling_is_above_one_step_of_one_value():
    references = torch.zeros(1, 8, 3, 32, 32, dtype=torch.uint8)
    samples = references.clone()
    samples[0, 0, 0, 0, 0] = 1
    batch = EvalBatch(samples, references, ["p"], torch.zeros(1, dtype=torch.int64))
    assert 91 < result_of(psnr(ceiling=100.0), batch)["value"] < 93
    assert result_of(RelativeL2("l2"), batch)["value"] == pytest.approx(1, rel=1e-6)


def test_value_range_scales_what_the_stock_metric_sees(pairs):
    signed = Paired(PeakSignalNoiseRatio(data_range=2.0), "PSNR", value_range="signed")
    torch.testing.assert_close(result_of(signed, pairs(3))["value"], result_of(psnr(), pairs(3))["value"])
    with pytest.raises(UserError, match="unit, signed"):
        psnr(value_range="byte")


def test_batches_and_their_order_change_nothing(pairs, rows_of):
    batch = pairs(5)
    whole = result_of(psnr(), batch)
    parts = result_of(psnr(), rows_of(batch, [4, 1]), rows_of(batch, [0]), rows_of(batch, [3, 2]))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_one_pair_has_no_standard_error_and_none_can_be_scored_twice(pairs):
    metric = psnr()
    assert result_of(metric, pairs(1))["standard_error"].isnan()
    with pytest.raises(AssertionError, match="twice"):
        result_of(metric, pairs(1))
    metric.reset()
    assert result_of(metric, pairs(2))["value"].isfinite()
