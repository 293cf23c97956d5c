"""WAV files come back to the bit, and one that was damaged is refused by name."""

import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from viditq.errors import UserError
from viditq.files import is_whole
from viditq.wav import read_wav, wav_bytes

SOUND_AT = torch.randint(-32768, 32768, (2, 101), generator=torch.Generator().manual_seed(0)).short()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "x.wav"
    path.write_bytes(wav_bytes(SOUND_AT, 24000))
    return path


@pytest.mark.parametrize("channels", [1, 2])
def test_it_comes_back_and_others_read_the_same(channels: int, tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    path.write_bytes(wav_bytes(SOUND_AT[:channels], 44100))
    sound_AT, rate = read_wav(path)
    assert torch.equal(sound_AT, SOUND_AT[:channels]) and rate == 44100 and is_whole(path)
    theirs = wavfile.read(path)
    assert theirs[0] == 44100 and np.array_equal(theirs[1].reshape(-1, channels).T, SOUND_AT[:channels].numpy())


@pytest.mark.parametrize("kept", [-1, -8, 44, 20, 0])
def test_one_that_was_cut_off_is_refused(kept: int, file: Path) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    assert not is_whole(file)
    with pytest.raises(UserError, match=r"x\.wav is missing or damaged .*Delete it"):
        read_wav(file)


def test_one_of_other_bits_is_refused(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "x.wav"), "wb") as file:
        file.setparams((1, 1, 8000, 0, "NONE", ""))
        file.writeframes(bytes(10))
    with pytest.raises(UserError, match="8 bits a value"):
        read_wav(tmp_path / "x.wav")


def test_one_that_is_missing_or_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "png.wav").write_bytes(b"\x89PNG" * 20)
    for name in ("none.wav", "png.wav"):
        with pytest.raises(UserError, match=name):
            read_wav(tmp_path / name)
        assert not is_whole(tmp_path / name)
