"""Pieces of a picture: strips of frames, wrapped text, boxes placed from the top left. Lengths in pixels.

Axes: F frames, C channels, H height, W width.
"""

from functools import cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PAPER, INK, GREY = "#ffffff", "#1c1e21", "#60656b"


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def line_height(face: ImageFont.FreeTypeFont) -> int:
    """Distance between the tops of two lines."""
    return round(1.35 * face.size)


def wrap(text: str, face: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """Break at spaces, or inside a word that is too long itself; an ellipsis says that lines were cut."""
    lines: list[str] = []
    for piece in (piece for word in text.split() for piece in _fit(word, face, width)):
        if lines and face.getlength(f"{lines[-1]} {piece}") <= width:
            lines[-1] += f" {piece}"
        else:
            lines.append(piece)
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and face.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: max_lines - 1], last.rstrip() + "…"]
    return lines


def _fit(word: str, face: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """A word in pieces no wider than `width`."""
    pieces = [""]
    for letter in word:
        if pieces[-1] and face.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


def strip(clip_FCHW: Tensor, height: int, max_frames: int, gap: int = 2) -> Image.Image:
    """Frames side by side, evenly chosen first to last when there are more than `max_frames`.

    Small frames are enlarged by whole pixels to at most `height`, large ones reduced to it.
    """
    count = min(len(clip_FCHW), max_frames)
    chosen = [round(i * (len(clip_FCHW) - 1) / max(count - 1, 1)) for i in range(count)]
    frames = [scaled(clip_FCHW[i], height) for i in chosen]
    width, tall = frames[0].size
    image = Image.new("RGB", (count * width + (count - 1) * gap, tall), PAPER)
    for i, frame in enumerate(frames):
        image.paste(frame, (i * (width + gap), 0))
    return image


def scaled(frame_CHW: Tensor, height: int, colors: int | None = None) -> Image.Image:
    """One uint8 frame (C = 1 or 3), nearest when enlarged so that its pixels are seen, area when reduced.

    colors: of a palette, chosen before a frame is enlarged, which is faster and gives the same; None = all.
    """
    image = Image.fromarray(frame_CHW.expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu().numpy())
    if image.height <= height:
        factor = height // image.height
        if colors is not None:
            image = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=colors)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    reduced = image.resize((round(image.width * height / image.height), height), Image.Resampling.BOX)
    return reduced if colors is None else reduced.convert("P", palette=Image.Palette.ADAPTIVE, colors=colors)


def draw_lines(
    draw: ImageDraw.ImageDraw,
    left: int,
    top: int,
    lines: list[str],
    face: ImageFont.FreeTypeFont,
    color: str = INK,
) -> int:
    """Draw lines one below the other; returns where the next one would start."""
    for line in lines:
        draw.text((left, top), line, font=face, fill=color)
        top += line_height(face)
    return top
