"""Whether a clip of LTX-2 is long enough for any sound; told without torch, by the audio VAE's configuration."""

import json
import math
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
    Also for a frame rate that is none.

    model: a ModelAdapter, or its fields and the `folder` of the pipeline.
    """
    if not model.pipeline.startswith(FAMILY) or OWN_LENGTH in model.pipeline or model.num_frames is None:
        return
    rate = model.call.get("frame_rate", FRAME_RATE)
    if not _is_positive(rate):
        raise UserError(f"model.call.frame_rate={rate!r} must be a number of frames a second, above 0, such as 24.")
    values = {**DEFAULTS, **_config(model.folder / PART)}
    if values.get("_class_name") != OF_LTX2 or not all(_is_positive(values[key]) for key in DEFAULTS):
        return
    a_second = values["sample_rate"] / values["mel_hop_length"] / VALUES_APART

    def count(frames: int, frame_rate: float) -> int:
        return round(frames / frame_rate * a_second)

    if count(model.num_frames, rate):
        return
    stored = _config(model.folder / VAE).get("temporal_compression_ratio")
    together = stored if isinstance(stored, int) and stored > 0 else TOGETHER
    # Half a value is rounded to none: what lasts so long is near, however large the numbers are.
    frames = 1 + max(int(rate / a_second / 2 - 1) // together, 0) * together
    slower = min(int(rate), int(2 * model.num_frames * a_second) + 1)
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


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _config(part: Path) -> dict[str, Any]:
    file = part / "config.json"
    found = json.loads(file.read_text()) if is_whole(file) else {}
    return found if isinstance(found, dict) else {}
