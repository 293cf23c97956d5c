"""Clips as contact sheets inside data: addresses, small enough for one page.

Axes: F frames, C channels (1 or 3), H height, W width. Lengths in pixels.
"""

import io
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import torch
from PIL import Image
from torch import Tensor

MAX_MEDIA_BYTES = 10_500_000  # base64 adds a third: 14 MB of a page that stays below 15
MAX_COLUMNS = 8
Clips = Callable[[], tuple[Tensor, Tensor]]
"""Loads (float clip, quantized clip), both uint8 [F, C, H, W]; called once or twice, so that one pair is in memory."""


@dataclass(frozen=True)
class Encoding:
    """How frames are stored: no side above `max_side`; WebP of `quality`, or lossless PNG where that is None."""

    max_side: int
    quality: int | None = None

    @property
    def file_type(self) -> str:
        return "png" if self.quality is None else "webp"


ENCODINGS = (Encoding(512), *(Encoding(*e) for e in ((512, 90), (256, 90), (256, 75), (192, 75), (128, 75), (96, 60))))
"""Tried in this order until the page is small enough; the last is taken in any case."""


@dataclass(frozen=True)
class Sheet:
    """All frames of a clip in one picture, row by row; `width` and `height` are those of one stored frame."""

    address: str
    num_frames: int
    columns: int
    width: int
    height: int
    original_width: int
    original_height: int
    num_bytes: int

    @property
    def reduced(self) -> bool:
        return self.width != self.original_width


@dataclass(frozen=True)
class Media:
    """One (float, quantized) pair of sheets per prompt, all stored alike."""

    sheets: tuple[tuple[Sheet, Sheet], ...]
    encoding: Encoding

    @property
    def note(self) -> str:
        """What was done to the pictures, in a sentence."""
        first = self.sheets[0][0]
        size = f"{first.original_width} × {first.original_height}"
        reduced = any(sheet.reduced for pair in self.sheets for sheet in pair)
        what = f"reduced from {size} to {first.width} × {first.height} pixels" if reduced else f"{size} pixels"
        if self.encoding.quality is None:
            return f"Frames are {what} and stored as PNG{'' if reduced else ', lossless'}."
        return (
            f"Frames are {what} and stored as WebP of quality {self.encoding.quality}, which is not lossless: "
            "the difference shows a little of the compression as well. The samples on disk are exact."
        )


def encode_pairs(pairs: Sequence[Clips], max_bytes: int = MAX_MEDIA_BYTES) -> Media:
    """Sheets of all pairs in the first of ENCODINGS that keeps them below `max_bytes` in total.

    The first pair tells which to try, so that most clips are loaded only once.
    """
    if not pairs:
        return Media((), ENCODINGS[0])
    for i, encoding in enumerate(ENCODINGS):
        last = i == len(ENCODINGS) - 1
        if not last and len(pairs) * _num_bytes([_encode(pairs[0], encoding)]) > max_bytes:
            continue
        sheets = tuple(_encode(clips, encoding) for clips in pairs)
        if last or _num_bytes(sheets) <= max_bytes:
            return Media(sheets, encoding)
    raise AssertionError("the last encoding is always taken")


def _num_bytes(pairs: Sequence[tuple[Sheet, Sheet]]) -> int:
    return sum(sheet.num_bytes for pair in pairs for sheet in pair)


def _encode(clips: Clips, encoding: Encoding) -> tuple[Sheet, Sheet]:
    reference_FCHW, sample_FCHW = clips()
    assert reference_FCHW.shape == sample_FCHW.shape, "float and quantized clips have one shape"
    return make_sheet(reference_FCHW, encoding), make_sheet(sample_FCHW, encoding)


def make_sheet(clip_FCHW: Tensor, encoding: Encoding) -> Sheet:
    """Encode one uint8 clip; frames above `max_side` are reduced by averaging, smaller ones stay as they are."""
    num_frames, _, original_height, original_width = clip_FCHW.shape
    factor = min(1.0, encoding.max_side / max(original_height, original_width))
    width, height = max(1, round(original_width * factor)), max(1, round(original_height * factor))
    columns = min(num_frames, MAX_COLUMNS)
    image = Image.new("RGB", (columns * width, ceil(num_frames / columns) * height))
    for i, frame_CHW in enumerate(clip_FCHW):
        frame = Image.fromarray(_pixels(frame_CHW).numpy())
        frame = frame.resize((width, height), Image.Resampling.BOX) if factor < 1 else frame
        image.paste(frame, (i % columns * width, i // columns * height))
    buffer = io.BytesIO()
    if encoding.quality is None:
        image.save(buffer, format="PNG")
    else:
        image.save(buffer, format="WEBP", quality=encoding.quality)
    data = buffer.getvalue()
    address = f"data:image/{encoding.file_type};base64,{b64encode(data).decode()}"
    return Sheet(address, num_frames, columns, width, height, original_width, original_height, len(data))


def _pixels(frame_CHW: Tensor) -> Tensor:
    """[H, W, 3] on the CPU."""
    assert frame_CHW.dtype == torch.uint8, "clips are uint8"
    return frame_CHW.expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu()
