"""Samples are used only as they were written; what that costs is a look at each file's entry, not at its bytes."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from viditq.data import samples
from viditq.data.samples import (
    adopt_samples,
    checksum_path,
    load_sound,
    missing_samples,
    sample_files,
    sample_path,
    save_sample,
    save_sound,
    sound_path,
)
from viditq.errors import UserError
from viditq.wav import wav_bytes

WITH_SOUND = "video with sound"


@pytest.fixture(params=["image", "video", WITH_SOUND])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """Three samples, and their modality."""
    for index in range(3):
        clip_FCHW = torch.full((1 if request.param == "image" else 2, 3, 8, 8), 9 * index, dtype=torch.uint8)
        save_sample(sample_path(tmp_path / "samples", index, request.param), clip_FCHW)
        if request.param == WITH_SOUND:
            save_sound(sound_path(tmp_path / "samples", index), torch.full((2, 50), index, dtype=torch.int16), 8000)
    return tmp_path / "samples", request.param


def exchange(path: Path) -> None:
    shutil.copy2(path.with_name(path.name.replace("1", "2")), path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip_a_bit_and_set_the_time_back(path: Path) -> None:
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def lose_the_checksum(path: Path) -> None:
    checksum_path(path).unlink()


def damage_the_checksum(path: Path) -> None:
    checksum_path(path).write_text("nonsense")


CHANGES = [exchange, cut, flip_a_bit_and_set_the_time_back, grow, lose_the_checksum, damage_the_checksum, os.unlink]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_as_it_was_written_is_missing(change: Callable[[Path], None], folder: tuple[Path, str]) -> None:
    where, modality = folder
    assert missing_samples(where, 4, modality) == [3]
    change(sample_files(where, 1, modality)[-1])  # the sound, where there is one
    assert missing_samples(where, 4, modality) == [1, 3]


def test_frames_count_where_there_is_sound(tmp_path: Path) -> None:
    """And a clip alone, made before its sound was kept, is a sample only where no sound belongs to it."""
    save_sample(sample_path(tmp_path, 0, WITH_SOUND), torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert missing_samples(tmp_path, 1, "video") == [] and missing_samples(tmp_path, 1, WITH_SOUND) == [0]
    save_sound(sound_path(tmp_path, 0), SOUND_AT, 24000)
    assert missing_samples(tmp_path, 1, WITH_SOUND) == []
    assert (
        torch.equal(load_sound(sound_path(tmp_path, 0))[0], SOUND_AT)
        and load_sound(sound_path(tmp_path, 0))[1] == 24000
    )
    flip_a_bit_and_set_the_time_back(sample_path(tmp_path, 0, WITH_SOUND))
    assert missing_samples(tmp_path, 1, WITH_SOUND) == [0]


SOUND_AT = torch.arange(-5, 5, dtype=torch.int16).view(2, 5)


def test_unchanged_samples_are_not_read(folder: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples.hashlib, "file_digest", lambda *_: pytest.fail("read a sample"))
    assert missing_samples(*folder[:1], 3, folder[1]) == []


@pytest.mark.parametrize("renew", [True, False])
def test_copied_samples_are_read_once(renew: bool, folder: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    where, modality = Path(shutil.copytree(folder[0], folder[0].with_name("copy"))), folder[1]
    before = [checksum_path(sample_path(where, i, modality)).read_text() for i in range(3)]
    assert missing_samples(where, 3, modality, renew) == []
    after = [checksum_path(sample_path(where, i, modality)).read_text() for i in range(3)]
    assert (before == after) != renew and [line[:64] for line in before] == [line[:64] for line in after]


def test_a_checksum_is_that_of_the_file(folder: tuple[Path, str]) -> None:
    path = sample_path(*folder[:1], 0, folder[1])
    assert checksum_path(path).read_text().startswith(hashlib.sha256(path.read_bytes()).hexdigest())


def test_samples_of_an_earlier_version(folder: tuple[Path, str]) -> None:
    """Where no sample has a checksum, whole ones are taken and recorded; where some have, none is."""
    where, modality = folder
    assert adopt_samples(where, 3, modality) == 0
    for index in range(3):
        for path in sample_files(where, index, modality):
            checksum_path(path).unlink()
    cut(sample_path(where, 2, modality))
    assert missing_samples(where, 3, modality) == [2]
    assert adopt_samples(where, 3, modality) == 2
    exchange(sample_path(where, 1, modality))
    assert missing_samples(where, 3, modality) == [1, 2]


def test_sounds_that_are_not_alike_are_refused_by_name(tmp_path: Path) -> None:
    sound = torch.arange(68, dtype=torch.int16).repeat(2, 1)
    for index, (wave, rate) in enumerate(
        [(sound, 24000), (sound, 24000), (sound[:1], 24000), (sound, 12000), (sound[:, :0], 24000)]
    ):
        samples.sound_path(tmp_path, index).write_bytes(wav_bytes(wave, rate))
    paths = [samples.sound_path(tmp_path, index) for index in range(5)]
    sounds, rate = samples.sounds_alike(paths[:2])
    assert rate == 24000 and all(torch.equal(one, sound) for one in sounds)
    for other, told in zip(paths[2:], ("1 channels of 68 values", "12000 a second", "2 channels of 0"), strict=True):
        with pytest.raises(UserError, match=f"{other.name} has .*{told}|{told}.*Delete"):
            samples.sounds_alike([*paths[:2], other])
