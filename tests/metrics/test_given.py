"""Metrics against the picture that sampling starts from."""

import math

import pytest
import torch
from test_clip import replace, result_of, unit_frames
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from viditq.errors import UserError
from viditq.metrics.clip_encoder import load_clip
from viditq.metrics.given import ClipGiven, FirstFrame


def psnr() -> FirstFrame:
    return FirstFrame(metric=PeakSignalNoiseRatio(data_range=1.0), name="first", unit="dB", ceiling=100.0)


def test_the_first_frame_alone_counts(pairs) -> None:
    batch = pairs(3)
    given = [clip[0] for clip in batch.references]
    found = result_of(psnr(), replace(batch, given=given))
    assert found["per_sample_reference"].tolist() == [100.0] * 3  # the float clips begin with the picture itself
    for value, i in zip(found["per_sample"], batch.index.argsort(), strict=True):
        error = (batch.samples[i, 0].double() - given[i].double()).div(255).square().mean()
        assert float(value) == pytest.approx(-10 * math.log10(error), abs=1e-4)
    later = batch.samples.clone()
    later[:, 1:] = 0
    assert torch.equal(result_of(psnr(), replace(batch, samples=later, given=given))["per_sample"], found["per_sample"])


def test_ssim_of_an_image(pairs) -> None:
    batch = pairs(2, frames=1)
    metric = FirstFrame(metric=StructuralSimilarityIndexMeasure(data_range=1.0), name="first")
    found = result_of(metric, replace(batch, given=[clip[0] for clip in batch.references]))
    assert metric.higher_is_better and found["reference_value"] == 1 and 0 < found["value"] < 1


def test_no_picture_or_one_of_another_size(pairs) -> None:
    batch = pairs(2)
    with pytest.raises(UserError, match="compares with the picture that sampling starts from, and the prompts come"):
        psnr().update(batch)
    with pytest.raises(UserError, match=r"is shown is 20x18 pixels, the frames 20x20: it is no first frame"):
        psnr().update(replace(batch, given=[torch.zeros(3, 20, 18, dtype=torch.uint8)] * 2))


def test_clip_takes_pictures_of_any_size(pairs, clip_folder) -> None:
    batch = pairs(2)
    given = [batch.data[0, 0], batch.data[1, 0, :, :, 2:]]
    found = result_of(ClipGiven(load_clip(str(clip_folder)), "given"), replace(batch, given=given))
    for column, clips in (("per_sample", batch.samples), ("per_sample_reference", batch.references)):
        frames = unit_frames(clip_folder, clips)
        own = [unit_frames(clip_folder, picture[None, None])[0, 0] for picture in given]
        expected = [100 * (frames[i] @ own[i]).mean() for i in batch.index.argsort().tolist()]
        assert found[column].tolist() == pytest.approx(expected, abs=0.3)  # PIL rounds what it enlarges
