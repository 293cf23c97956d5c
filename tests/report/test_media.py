"""Contact sheets hold the right frames; large clips are reduced until the page is small enough."""

import io
from base64 import b64decode

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from viditq.report.media import ENCODINGS, Encoding, Sheet, encode_pairs, make_sheet


def pixels(sheet: Sheet) -> np.ndarray:
    """The stored frames, [F, H, W, 3]."""
    data = b64decode(sheet.address.split(",", 1)[1])
    assert len(data) == sheet.num_bytes
    image = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    places = [divmod(i, sheet.columns) for i in range(sheet.num_frames)]
    h, w = sheet.height, sheet.width
    return np.stack([image[y * h : (y + 1) * h, x * w : (x + 1) * w] for y, x in places])


def noise(frames: int, channels: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (frames, channels, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (8, 3, 32, 48), (19, 3, 10, 6), (3, 1, 8, 8)])
def test_small_frames_are_kept_exactly(shape):
    clip_FCHW = noise(*shape)
    sheet = make_sheet(clip_FCHW, Encoding(64))
    expected = clip_FCHW.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(pixels(sheet), expected)
    assert sheet.address.startswith("data:image/png;base64,") and not sheet.reduced


def test_large_frames_are_averaged_down_to_the_stated_side():
    clip_FCHW = noise(2, 3, 64, 128)
    sheet = make_sheet(clip_FCHW, Encoding(32))
    mean = torch.nn.functional.avg_pool2d(clip_FCHW.float(), 4).permute(0, 2, 3, 1).numpy()
    assert (sheet.width, sheet.height, sheet.original_width, sheet.reduced) == (32, 16, 128, True)
    np.testing.assert_allclose(pixels(sheet), mean, atol=1.01)


def test_lossy_frames_are_close():
    clip_FCHW = torch.linspace(0, 255, 64 * 64).view(1, 1, 64, 64).expand(4, 3, -1, -1).byte()
    sheet = make_sheet(clip_FCHW, Encoding(64, 90))
    assert sheet.address.startswith("data:image/webp;base64,")
    assert np.abs(pixels(sheet).astype(float) - clip_FCHW.permute(0, 2, 3, 1).numpy()).mean() < 3


def test_a_page_of_small_clips_is_lossless_and_says_so():
    clip_FCHW = noise(8, 3, 32, 32)
    media = encode_pairs([lambda: (clip_FCHW, clip_FCHW)] * 3)
    assert media.encoding.quality is None and len(media.sheets) == 3
    assert media.note == "Frames are 32 × 32 pixels and stored as PNG, lossless."


def test_clips_that_take_too_much_are_reduced_and_the_page_says_so():
    clip_FCHW = noise(4, 3, 300, 300)
    whole = encode_pairs([lambda: (clip_FCHW, clip_FCHW)] * 2)
    assert whole.encoding == ENCODINGS[0]
    limit = sum(sheet.num_bytes for pair in whole.sheets for sheet in pair) // 4
    media = encode_pairs([lambda: (clip_FCHW, clip_FCHW)] * 2, limit)
    assert ENCODINGS.index(media.encoding) > 0
    assert sum(sheet.num_bytes for pair in media.sheets for sheet in pair) <= limit
    assert "not lossless" in media.note and "300 × 300" in media.note


def test_the_last_encoding_is_taken_however_large():
    clip_FCHW = noise(2, 3, 200, 100)
    media = encode_pairs([lambda: (clip_FCHW, clip_FCHW)], max_bytes=1)
    assert media.encoding == ENCODINGS[-1]
    assert "reduced from 100 × 200 to 48 × 96 pixels" in media.note


def test_clips_are_loaded_pair_by_pair_and_only_the_first_for_trying():
    clip_FCHW, loaded = noise(2, 3, 300, 300), []

    def load(i: int) -> tuple[Tensor, Tensor]:
        loaded.append(i)
        return clip_FCHW, clip_FCHW

    encode_pairs([lambda i=i: load(i) for i in range(3)], max_bytes=100_000)
    assert loaded.count(1) == loaded.count(2) == 1
