"""Clips of LTX-2 that are too short for any sound are refused before anything is loaded."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from viditq.errors import UserError
from viditq.models.sound_length import check_sound_length


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of the released models: 16,000 / 160 / 4 = 25 values a second, frames 8 n + 1."""
    for part, config in (("audio_vae", {"_class_name": "AutoencoderKLLTX2Audio"}), ("vae", {})):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    return tmp_path


def model(folder: Path, frames: int | None, fps: int, **call: Any) -> Any:
    return SimpleNamespace(folder=folder, num_frames=frames, fps=fps, call=call, pipeline="LTX2Pipeline")


@pytest.mark.parametrize(
    ("frames", "fps", "more", "slower"), [(1, 50, 9, 49), (1, 60, 9, 49), (9, 1000, 25, 449), (1, 2000, 41, 49)]
)
def test_what_is_too_short_and_what_is_not(folder: Path, frames: int, fps: int, more: int, slower: int) -> None:
    """`round` takes half a value for none."""
    with pytest.raises(UserError) as error:
        check_sound_length(model(folder, frames, fps, frame_rate=fps))
    assert f"model.num_frames={frames} at model.fps={fps} last" in str(error.value)
    assert f"Give model.num_frames={more} or more, or model.fps={slower} or less." in str(error.value)
    check_sound_length(model(folder, more, fps, frame_rate=fps))
    check_sound_length(model(folder, frames, slower, frame_rate=slower))
    for fewer, faster in ((more - 8, fps), (frames, slower + 1)):
        with pytest.raises(UserError):
            check_sound_length(model(folder, fewer, faster, frame_rate=faster))


def test_the_rate_is_that_of_the_call(folder: Path) -> None:
    check_sound_length(model(folder, 1, 60))  # told nothing, it takes 24
    with pytest.raises(UserError, match=r"at model\.call\.frame_rate=60 last 0\.017 s"):
        check_sound_length(model(folder, 1, 24, frame_rate=60))


@pytest.mark.parametrize("rate", ["24", "fast", 0, -24, float("nan"), float("inf"), [24], True, None])
def test_a_rate_that_is_none_is_refused(folder: Path, rate: Any) -> None:
    with pytest.raises(UserError, match=r"model\.call\.frame_rate=.* must be a number of frames a second"):
        check_sound_length(model(folder, 121, 24, frame_rate=rate))


@pytest.mark.parametrize("value", [0, -1, None, "16k", [1]])
@pytest.mark.parametrize("key", ["sample_rate", "mel_hop_length"])
def test_of_a_damaged_configuration_nothing_is_told(folder: Path, key: str, value: Any) -> None:
    config = {"_class_name": "AutoencoderKLLTX2Audio", key: value}
    (folder / "audio_vae" / "config.json").write_text(json.dumps(config))
    check_sound_length(model(folder, 1, 60, frame_rate=60))


@pytest.mark.parametrize("ratio", [0, -8, "8", None, 0.5])
def test_absurd_numbers_end_in_a_message_too(folder: Path, ratio: Any) -> None:
    (folder / "vae" / "config.json").write_text(json.dumps({"temporal_compression_ratio": ratio}))
    with pytest.raises(UserError, match=r"=20000001 or more, or model\.call\.frame_rate=49 or less"):
        check_sound_length(model(folder, 1, 24, frame_rate=10**9))


def test_of_other_models_nothing_is_known(folder: Path) -> None:
    check_sound_length(model(folder, None, 60, frame_rate=60))
    (folder / "audio_vae" / "config.json").write_text('{"_class_name": "AutoencoderOobleck"}')
    check_sound_length(model(folder, 1, 60, frame_rate=60))
    check_sound_length(model(folder / "nothing", 1, 60, frame_rate=60))
