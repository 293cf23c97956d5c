"""Prompts and samples on disk."""

from pathlib import Path

import pytest
import torch

from viditq.data.moving_shapes import SCENES
from viditq.data.prompts import MovingShapes, PromptFile
from viditq.data.samples import load_sample, missing_samples, sample_path, save_sample
from viditq.errors import UserError
from viditq.prompt import Prompt, conditions_of, key_of


@pytest.mark.parametrize("modality", ["image", "video"])
@pytest.mark.parametrize("seed", [0, 7])
def test_evaluation_and_calibration_scenes_are_disjoint(modality: str, seed: int) -> None:
    data = MovingShapes(modality, num_prompts=544, num_calibration_prompts=136, prompt_seed=seed)
    video = MovingShapes("video", num_prompts=544, num_calibration_prompts=136, prompt_seed=seed)
    assert len(set(video.prompts)) == 544 and len(set(video.calibration_prompts)) == 136
    assert not set(video.prompts) & set(video.calibration_prompts)
    assert len(set(video.prompts) | set(video.calibration_prompts)) == len(SCENES)
    assert ("moving" in " ".join(data.prompts)) == (modality == "video")


def test_fewer_prompts_are_the_first_of_more() -> None:
    few, many = (MovingShapes("video", n, n) for n in (3, 9))
    assert many.prompts[:3] == few.prompts and many.calibration_prompts[:3] == few.calibration_prompts


@pytest.mark.parametrize(("modality", "frames"), [("image", 1), ("video", 8)])
def test_real_clips_belong_to_their_prompt(modality: str, frames: int) -> None:
    data = MovingShapes(modality, 4, 1)
    clips = data.real_clips([0, 3])
    assert clips.shape == (2, frames, 3, 32, 32) and clips.dtype == torch.uint8
    assert torch.equal(clips[1], MovingShapes(modality, 4, 1).real_clips([3])[0])


def test_prompt_file(tmp_path: Path) -> None:
    file, other = tmp_path / "prompts.txt", tmp_path / "calibration.txt"
    file.write_text("one\n\n  two  \nthree\nfour\n", encoding="utf-8")
    other.write_text("fünf\n", encoding="utf-8")
    data = PromptFile(str(file), 2, 1)
    assert (data.prompts, data.calibration_prompts) == (["one", "two"], ["three"])
    assert PromptFile(str(file), 9, 2).calibration_prompts == ["one", "two"]  # none are left over
    assert PromptFile(str(file), 2, 9, str(other)).calibration_prompts == ["fünf"]
    assert data.real_clips([0]) is None


@pytest.mark.parametrize(("modality", "frames"), [("image", 1), ("video", 5)])
def test_samples_are_lossless(modality: str, frames: int, tmp_path: Path) -> None:
    clip = torch.randint(256, (frames, 3, 16, 24), dtype=torch.uint8)
    save_sample(sample_path(tmp_path, 7, modality), clip)
    assert torch.equal(load_sample(sample_path(tmp_path, 7, modality)), clip)
    assert missing_samples(tmp_path, 9, modality) == [0, 1, 2, 3, 4, 5, 6, 8]
    assert len(list(tmp_path.glob("0*"))) == 1


@pytest.mark.parametrize("modality", ["image", "video"])
def test_damaged_sample_is_named(modality: str, tmp_path: Path) -> None:
    path = sample_path(tmp_path, 0, modality)
    save_sample(path, torch.randint(256, (1, 3, 16, 16), dtype=torch.uint8))
    path.write_bytes(path.read_bytes()[:-80])
    with pytest.raises(UserError, match=r"000000.*Delete it"):
        load_sample(path)


def test_first_frames_are_those_of_the_real_clips(tmp_path: Path) -> None:
    data = MovingShapes("video", 3, 2, first_frames=str(tmp_path))
    assert data.prompts[0] == Prompt(MovingShapes("video", 3, 2).prompts[0], conditions_of(data.prompts[0]))
    clips = data.real_clips([0, 1, 2])
    for prompt, clip in zip(data.prompts, clips, strict=True):
        assert isinstance(prompt, Prompt)
        assert torch.equal(torch.from_numpy(prompt.pixels()["image"]).permute(2, 0, 1), clip[0])
    files = [conditions_of(prompt)["image"] for prompt in [*data.prompts, *data.calibration_prompts]]
    assert len({file.read_bytes() for file in files}) == 5 and [*data.files] == sorted(files)
    written = files[1].stat().st_mtime_ns
    files[0].write_bytes(files[1].read_bytes())  # exchanged: drawn anew
    again = MovingShapes("video", 3, 2, first_frames=str(tmp_path))
    assert [key_of(prompt) for prompt in again.prompts] == [key_of(prompt) for prompt in data.prompts]
    assert files[1].stat().st_mtime_ns == written
    with pytest.raises(UserError, match=r"data\.images and data\.first_frames both give"):
        MovingShapes("video", 3, 2, images=str(tmp_path), first_frames=str(tmp_path))
