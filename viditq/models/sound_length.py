"""Whether a clip of LTX-2 is long enough for any sound; told without torch, by the audio VAE's configuration."""

import json
from pathlib import Path
from typing import Any

from viditq.errors import UserError
from viditq.files import is_whole

FAMILY, PART, OF_LTX2 = "LTX2", "audio_vae", "AutoencoderKLLTX2Audio"
DEFAULTS = {"sample_rate": 16_000, "mel_hop_length": 160}  # of its class
VALUES_APART = 4  # spectra that it makes one latent of
VAE, TOGETHER = "vae", 8  # the frames', which makes one latent of so many, but for the first
FRAME_RATE = 24.0  # of its pipelines' calls, where none is given
OWN_LENGTH = "DFR"  # in the names of pipelines that choose how long a clip is


def check_sound_length(model: Any) -> None:
    """Raises UserError where the sound of a clip of LTX-2 has no latent: its pipeline rounds their number, to 0 too.

    model: a ModelAdapter, or its fields and the `folder` of the pipeline.
    """
    if not model.pipeline.startswith(FAMILY) or OWN_LENGTH in model.pipeline or model.num_frames is None:
        return
    config = _config(model.folder / PART)
    if config.get("_class_name") != OF_LTX2:
        return
    rate = model.call.get("frame_rate") or FRAME_RATE
    values = {**DEFAULTS, **config}
    a_second = values["sample_rate"] / values["mel_hop_length"] / VALUES_APART

    def count(frames: int, frame_rate: float) -> int:
        return round(frames / frame_rate * a_second)

    if count(model.num_frames, rate):
        return
    together = _config(model.folder / VAE).get("temporal_compression_ratio") or TOGETHER
    frames, slower = 1, int(rate)
    while not count(frames, rate):
        frames += together
    while slower > 1 and not count(model.num_frames, slower):
        slower -= 1
    key = "model.fps" if rate == model.fps else "model.call.frame_rate"
    raise UserError(
        f"model.num_frames={model.num_frames} at {key}={rate:g} last {model.num_frames / rate:.3f} s, too short for "
        f"the sound of {model.pipeline}, which has {a_second:g} values a second and would have none. Give "
        f"model.num_frames={frames} or more, or {key}={slower} or less."
    )


def _config(part: Path) -> dict[str, Any]:
    file = part / "config.json"
    found = json.loads(file.read_text()) if is_whole(file) else {}
    return found if isinstance(found, dict) else {}
