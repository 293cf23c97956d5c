"""A prompt with the pictures that sampling starts from: a first frame, a picture to edit, a mask, a clip.

Legend: F frames, H, W pixels, C = 3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from viditq.errors import UserError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Prompt(str):
    """A text, and under the names of the pipeline's arguments the files of pictures (or folders of frames).

    captions: what an edit begins with and should end with (`before`, `after`), for metrics. Two are equal where texts
    and content are. Raises UserError for a file that is no picture.
    """

    conditions: Mapping[str, Path]
    captions: Mapping[str, str]
    digest: str
    """Hash of the names and the files' content, and of captions."""

    def __new__(cls, text: str, conditions: Mapping[str, Path], captions: Mapping[str, str] | None = None) -> Prompt:
        """A prompt without conditions is a plain str."""
        prompt = super().__new__(cls, text)
        prompt.conditions, prompt.captions = dict(conditions), dict(captions or {})
        hashes = {name: [_digest(file) for file in frames_of(path)] for name, path in conditions.items()}
        content = [*sorted(hashes.items()), *sorted(prompt.captions.items())]
        prompt.digest = hashlib.sha256(repr(content).encode()).hexdigest()[:32]
        return prompt

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True and self.digest == getattr(other, "digest", None)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((str(self), self.digest))

    def pixels(self) -> dict[str, np.ndarray[Any, Any]]:
        """Argument -> uint8 [H, W, C], of a folder [F, H, W, C]."""
        return {name: _pixels(path) for name, path in self.conditions.items()}


def conditions_of(prompt: str) -> Mapping[str, Path]:
    """The pictures of a prompt; none of a plain text."""
    return prompt.conditions if isinstance(prompt, Prompt) else {}


def captions_of(prompt: str) -> Mapping[str, str]:
    """What its picture shows, and what the result should; none of a plain text."""
    return prompt.captions if isinstance(prompt, Prompt) else {}


def key_of(prompt: str) -> Any:
    """What tells it from others, as plain values: the text, or the text and the digest of its pictures."""
    return [str(prompt), prompt.digest] if isinstance(prompt, Prompt) else prompt


def keys_of(prompts: Iterable[str]) -> list[Any]:
    """The same of several."""
    return [key_of(prompt) for prompt in prompts]


def frames_of(path: Path) -> list[Path]:
    """The file itself, or the pictures of a folder by name; raises UserError where there are none."""
    if not path.is_dir():
        if not path.is_file() or path.suffix.lower() not in PICTURES:
            raise UserError(f"{path} is no picture. Give a file of {', '.join(PICTURES)}, or a folder of such files.")
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)
    if not found:
        raise UserError(f"{path} holds no pictures ({', '.join(PICTURES)}).")
    return found


def _digest(file: Path) -> str:
    try:
        with Image.open(file) as image:
            image.verify()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{file} is damaged or no picture ({error}). Replace it.") from error
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _pixels(path: Path) -> np.ndarray[Any, Any]:
    frames = [_read(file) for file in frames_of(path)]
    if any(frame.shape != frames[0].shape for frame in frames):
        raise UserError(f"The frames in {path} differ in size. Make all of them {frames[0].shape[1::-1]} pixels.")
    return np.stack(frames) if path.is_dir() else frames[0]


def _read(file: Path) -> np.ndarray[Any, Any]:
    """As diffusers' load_image: turned as the camera says, three channels."""
    with Image.open(file) as image:
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))
