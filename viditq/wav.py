"""Waveforms as WAV files of 16-bit PCM, which every player takes. Legend: A audio channels, T values of each."""

from __future__ import annotations

import io
import wave
from pathlib import Path
from typing import TYPE_CHECKING

from viditq.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

WIDTH, HEADER = 2, 44  # bytes of a value, and of what a file begins with
FULL_SCALE = 32768  # the value that a waveform of -1 has


def wav_bytes(sound_AT: Tensor, rate: int) -> bytes:
    """A whole file. sound_AT: int16; rate: values of a channel in a second."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(len(sound_AT))
        file.setsampwidth(WIDTH)
        file.setframerate(rate)
        file.writeframes(sound_AT.cpu().T.contiguous().numpy().astype("<i2").tobytes())
    return buffer.getvalue()


def read_wav(path: Path) -> tuple[Tensor, int]:
    """int16 [A, T] and the rate, in values a second.

    Raises UserError naming a file that is missing, damaged or no WAV of 16 bits.
    """
    import numpy as np
    import torch

    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate, count = file.getparams()[:4]
            content = file.readframes(count)
        if width != WIDTH or len(content) != count * channels * width:
            raise ValueError(f"{8 * width} bits a value, {len(content)} bytes of {count * channels * width}")
    except (OSError, EOFError, ValueError, wave.Error) as error:
        raise UserError(
            f"Sound {path} is missing or damaged ({error}). Delete it and run the command again."
        ) from error
    values = np.frombuffer(content, dtype="<i2").astype(np.int16).reshape(count, channels)
    return torch.from_numpy(values).T.contiguous(), rate
