"""The sound that a video pipeline makes beside its frames. Legend: B samples, A audio channels, T values of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.wav import FULL_SCALE

PARTS = ("audio_vae", "vocoder")
SILENT = ("LTX2HDRPipeline",)  # has the parts, and returns None in the waveform's place


def makes_sound(adapter: Any) -> bool:
    """Whether the pipeline returns a waveform beside its frames: it has the parts for it, and is not told otherwise.

    Of Kandinsky 6 the parts are optional (None in model_index.json), and call.sample_audio=false leaves sound out.
    """
    if adapter.modality != "video" or adapter.pipeline in SILENT or adapter.call.get("sample_audio") is False:
        return False
    index = adapter.index()
    return all(isinstance(entry := index.get(name), list) and entry[0] is not None for name in PARTS)


def sampling_rate(pipeline: Any) -> int:
    """Values of a channel in a second: what the vocoder says, else (it works at one rate) what the audio VAE says."""
    vocoder, audio_vae = pipeline.vocoder.config, pipeline.audio_vae.config
    return int(getattr(vocoder, "output_sampling_rate", None) or audio_vae.sample_rate)


def waveforms(adapter: Any, out: Sequence[Any], count: int) -> Tensor:
    """The sound of `count` samples as 16-bit values, int16 [B, A, T], from what a pipeline's call returns.

    Raises UserError where it has none, or of another number of samples, or one that is not finite.
    """
    found = torch.as_tensor(out[1]) if len(out) > 1 and out[1] is not None else None
    if found is None or found.ndim not in (2, 3) or len(found) != count or not found.numel():
        what = "none" if found is None else f"one of shape {[*found.shape]}"
        raise UserError(
            f"{adapter.pipeline} has {' and '.join(PARTS)}, and returns no waveform for each of {count} samples but "
            f"{what}. Choose a pipeline that does, or the same without these parts."
        )
    if not torch.isfinite(found).all():
        raise UserError("The sound of a sample is not finite. Use model.dtype=float32 or more bits.")
    sound_BAT = found if found.ndim == 3 else found[:, None]
    return (sound_BAT.float() * FULL_SCALE).round().clamp(-FULL_SCALE, FULL_SCALE - 1).to(torch.int16)
