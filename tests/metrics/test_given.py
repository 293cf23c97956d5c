"""Metrics against the picture that sampling starts from."""

import math
from dataclasses import replace as changed
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_clip import replace, result_of, unit_frames
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from viditq.data.moving_shapes import COLORS, SCENES, Scene, render
from viditq.errors import UserError
from viditq.metrics.batch import EvalBatch
from viditq.metrics.clip_encoder import load_clip
from viditq.metrics.given import ClipGiven, EditDirection, FirstFrame
from viditq.prompt import Prompt


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


def pictures_of(scenes: list[Scene]) -> torch.Tensor:
    """One picture of each, uint8 [B, 1, C, H, W], at the places that their numbers draw."""
    clips = [render([scene], torch.Generator().manual_seed(i))[0, :1] for i, scene in enumerate(scenes)]
    return (torch.stack(clips) * 255).round().to(torch.uint8)


def edits(file: Path, captions: list[tuple[str, str]], made: torch.Tensor, given: torch.Tensor) -> EvalBatch:
    Image.new("RGB", (4, 4)).save(file)
    prompts: list[str] = [
        Prompt("recolour it", {"image": file}, {"before": one, "after": other}) for one, other in captions
    ]
    return EvalBatch(made, given, prompts, torch.arange(len(made)), given=[*given[:, 0]])


def test_an_edit_is_judged_by_its_direction(tmp_path: Path) -> None:
    still = [s for s in SCENES if s.motion == 4 and s.background == 0][::3][:8]
    recoloured = [changed(s, color=(s.color + 2) % len(COLORS)) for s in still]
    reshaped = [changed(s, shape=(s.shape + 1) % 4) for s in still]
    texts = [(a.caption(False), b.caption(False)) for a, b in zip(still, recoloured, strict=True)]
    given, file, metric = pictures_of(still), tmp_path / "x.png", EditDirection(load_clip("shipped:clip"), "edit")

    def score(made: torch.Tensor, captions: list[tuple[str, str]]) -> float:
        metric.reset()
        found = result_of(metric, edits(file, captions, made, given))
        assert found["per_sample_reference"].abs().max() < 1  # the float model's: the picture as it was
        return float(found["value"])

    assert score(pictures_of(recoloured), texts) > 80
    assert score(pictures_of(recoloured), [(after, before) for before, after in texts]) < -80
    assert abs(score(pictures_of(reshaped), texts)) < 25
    assert abs(score(given, texts)) < 1


def test_an_edit_without_a_text_before_it(pairs, clip_folder) -> None:
    batch = pairs(2)
    batch = replace(batch, given=[clip[0] for clip in batch.data])
    clip = load_clip(str(clip_folder))
    with pytest.raises(UserError, match="wants to know what the given picture shows, and 'a red circle' does not"):
        EditDirection(clip, "edit").update(batch)
    with pytest.raises(UserError, match="and 'and a blue one' does not say it"):  # before anything is sampled
        EditDirection(clip, "edit").check_prompts(["and a blue one"])
    with pytest.raises(UserError, match="before and after the edit is the same, 'a red circle'"):
        EditDirection(clip, "edit", before="a red circle").update(batch)
    found = result_of(EditDirection(clip, "edit", before="a green square"), batch)
    assert found["per_sample"].abs().max() <= 100 and found["value"] != found["reference_value"]
