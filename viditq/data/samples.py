"""Samples on disk: PNG for an image, uint8 safetensors for a video, 16-bit WAV for its sound, which is rounded once.

Legend: F frames, C = 3, H, W pixels; A audio channels, T values of each. Beside each file lies its checksum, so that
one that was exchanged or altered is made again instead of used.
"""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from viditq.errors import UserError
from viditq.files import atomic, is_whole, write_tensors
from viditq.wav import read_wav, wav_bytes

ENDINGS = {"image": (".png",), "video": (".safetensors",), "video with sound": (".safetensors", ".wav")}
"""Kind of sample -> the endings of its files; the first is that of its picture or frames."""


def sample_path(folder: Path, index: int, kind: str) -> Path:
    """The file with the picture or frames of prompt `index`."""
    return sample_files(folder, index, kind)[0]


def sample_files(folder: Path, index: int, kind: str) -> list[Path]:
    """All files of prompt `index`, but for their checksums."""
    return [folder / f"{index:06d}{ending}" for ending in ENDINGS[kind]]


def sound_path(folder: Path, index: int) -> Path:
    """The file with the sound of prompt `index`."""
    return folder / f"{index:06d}.wav"


def save_sample(path: Path, clip_FCHW: Tensor) -> None:
    """Write one uint8 sample and its checksum."""
    if path.suffix == ".png":
        with atomic(path) as temporary:
            Image.fromarray(clip_FCHW[0].permute(1, 2, 0).numpy()).save(temporary, format="PNG")
    else:
        write_tensors(path, {"frames": clip_FCHW})
    record(path)


def save_sound(path: Path, sound_AT: Tensor, rate: int) -> None:
    """Write the sound of one sample, int16, and its checksum. rate: values of a channel in a second."""
    with atomic(path) as temporary:
        temporary.write_bytes(wav_bytes(sound_AT, rate))
    record(path)


def load_sound(path: Path) -> tuple[Tensor, int]:
    """Read the sound of one sample: int16 [A, T] and its rate. Raises UserError for a damaged or missing file."""
    return read_wav(path)


def sounds_alike(paths: Sequence[Path]) -> tuple[list[Tensor], int]:
    """The sounds in these files and their rate.

    Raises UserError as `load_sound`, and for one of other channels, length or rate than the first: no pair of them is
    to be compared, or played, as if it were alike.
    """
    sounds, rates = zip(*(load_sound(path) for path in paths), strict=True)
    for path, sound, rate in zip(paths, sounds, rates, strict=True):
        if (sound.shape, rate) != (sounds[0].shape, rates[0]):
            raise UserError(
                f"Sound {path} has {_told(sound, rate)}, {paths[0]} has {_told(sounds[0], rates[0])}. Delete the one "
                "that is wrong and run the command again."
            )
    return [*sounds], rates[0]


def _told(sound_AT: Tensor, rate: int) -> str:
    return f"{len(sound_AT)} channels of {sound_AT.shape[1]} values, {rate} a second"


def checksum_path(path: Path) -> Path:
    """Where a sample's checksum is kept."""
    return path.with_name(f".{path.name}.sha256")


def record(path: Path) -> None:
    """Write down what a sample holds: its sha256, its size and when it last changed."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    status = path.stat()
    with atomic(checksum_path(path)) as temporary:
        temporary.write_text(f"{digest} {status.st_size} {status.st_ctime_ns}\n")


def is_intact(path: Path, renew: bool) -> bool:
    """Whether a sample is there and is the one that was recorded.

    It is read only where the system says that it has changed since (st_ctime, which no copying or touching sets back),
    and with `renew` recorded again, so as not to be read the next time.
    """
    try:
        digest, size, changed = checksum_path(path).read_text().split()
        status = path.stat()
        if status.st_size != int(size) or status.st_ctime_ns == int(changed):
            return status.st_size == int(size)
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                return False
    except (OSError, ValueError):
        return False
    if renew:
        with suppress(OSError):  # a cache may be read-only
            record(path)
    return True


def load_sample(path: Path) -> Tensor:
    """Read one sample, uint8 [F, C, H, W]; raises UserError naming a file that is damaged or missing."""
    try:
        if path.suffix == ".png":
            return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None]
        return load_file(path)["frames"]
    except (OSError, SafetensorError, KeyError, SyntaxError) as error:
        raise UserError(
            f"Sample {path} is missing or damaged ({error}). Delete it and run the command again."
        ) from error


def missing_samples(folder: Path, count: int, kind: str, renew: bool = True) -> list[int]:
    """Indices of the prompts of whose sample a file is not on disk, or not as it was written. renew: as in `is_intact`.

    Where there are no checksums at all (`adopt_samples`) a sample only has to be whole.
    """
    there = partial(is_intact, renew=renew) if _has_checksums(folder) else is_whole
    return [i for i in range(count) if not all(map(there, sample_files(folder, i, kind)))]


def _has_checksums(folder: Path) -> bool:
    return next(folder.glob(".*.sha256"), None) is not None


def adopt_samples(folder: Path, count: int, kind: str) -> int:
    """Record the samples of a folder that has no checksums, made before there were any; returns how many."""
    if _has_checksums(folder):
        return 0
    samples = [sample_files(folder, i, kind) for i in range(count)]
    found = [files for files in samples if all(map(is_whole, files))]
    for files in found:
        for path in files:
            record(path)
    return len(found)
