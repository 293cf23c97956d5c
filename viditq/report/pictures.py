"""Pictures that show what quantization did, pair by pair, and previews of clips.

Clips are uint8. Axes: B clips, F frames (an image has F = 1), C channels, H height, W width.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from viditq.files import atomic
from viditq.report.canvas import scaled, strip
from viditq.report.grid import Cell, draw_grid


def comparison_picture(
    samples: Tensor,
    references: Tensor,
    prompts: Sequence[str],
    scores: Tensor,
    path: Path,
    title: str,
    score_name: str = "PSNR",
    unit: str = "dB",
    higher_is_better: bool = True,
    labels: tuple[str, str] = ("float", "quantized"),
    max_pairs: int = 8,
    columns: int | None = None,
    frame_height: int | None = None,
    max_frames: int = 8,
    num_pairs: int | None = None,
) -> Path:
    """Write a PNG of the worst pairs, worst first: the float model above, the quantized one below.

    `samples`, `references` [B, F, C, H, W], `scores` [B]. A video is a strip of at most `max_frames` frames.
    `num_pairs`: of how many pairs these are the worst, where not all are given.
    `columns` and `frame_height` (pixels) default to 4 and 128 for images, 2 and 64 for video.
    """
    worst = torch.as_tensor(scores).argsort(descending=not higher_is_better, stable=True)[:max_pairs].tolist()
    columns = min(columns or (4 if samples.shape[1] == 1 else 2), len(worst))
    height = frame_height or (128 if samples.shape[1] == 1 else 64)
    cells = [
        Cell(
            [strip(clips[i], height, max_frames) for clips in (references, samples)],
            prompts[i],
            f"{score_name} {float(scores[i]):.4g} {unit}".strip(),
        )
        for i in worst
    ]
    subtitle = f"{len(worst)} of {num_pairs or len(samples)} pairs, worst first by {score_name}"
    picture = draw_grid(cells, columns, list(labels), title, subtitle)
    return save_picture(picture, path)


def rows_picture(
    rows: Sequence[tuple[str, Tensor]],
    path: Path,
    prompts: Sequence[str] = (),
    title: str = "",
    frame_height: int = 64,
    max_frames: int = 4,
) -> Path:
    """Write a PNG with one labelled row per model and one column per prompt.

    `rows` are (label, clips [B, F, C, H, W]) of equal shape; of a video at most `max_frames` frames show.
    """
    return save_picture(_rows(rows, prompts, title, frame_height, max_frames), path)


def rows_gif(
    rows: Sequence[tuple[str, Tensor]],
    path: Path,
    prompts: Sequence[str] = (),
    title: str = "",
    frame_height: int = 96,
    frames_per_second: float = 8,
) -> Path:
    """The same in motion, as an endlessly looping GIF."""
    pictures = [
        _rows([(label, clips[:, i : i + 1]) for label, clips in rows], prompts, title, frame_height, 1)
        for i in range(rows[0][1].shape[1])
    ]
    return _save_frames(pictures, path, frames_per_second)


def _rows(
    rows: Sequence[tuple[str, Tensor]], prompts: Sequence[str], title: str, frame_height: int, max_frames: int
) -> Image.Image:
    count = len(rows[0][1])
    assert all(clips.shape == rows[0][1].shape for _, clips in rows), "rows show the same prompts at one size"
    assert len(prompts) in (0, count), "one prompt per column, or none"
    cells = [
        Cell([strip(clips[i], frame_height, max_frames) for _, clips in rows], prompts[i] if prompts else "")
        for i in range(count)
    ]
    return draw_grid(cells, count, [label for label, _ in rows], title)


def comparison_gif(
    samples: Tensor, references: Tensor, scores: Tensor, path: Path, higher_is_better: bool = True, max_pairs: int = 6
) -> Path:
    """Write a GIF of the worst pairs in motion: the float model's clips above, the quantized ones below."""
    worst = torch.as_tensor(scores).argsort(descending=not higher_is_better, stable=True)[:max_pairs]
    rows = [torch.cat([_framed(clip) for clip in clips[worst]], -1) for clips in (references, samples)]
    both_FCHW = torch.cat(rows, -2)
    return save_gif(both_FCHW, path, height=3 * both_FCHW.shape[-2])


def _framed(clip_FCHW: Tensor) -> Tensor:
    """The clip with a white margin of two pixels."""
    return torch.nn.functional.pad(clip_FCHW, (2, 2, 2, 2), value=255)


def save_gif(clip_FCHW: Tensor, path: Path, frames_per_second: float = 8, height: int = 128) -> Path:
    """Write a clip [F, C, H, W] as an endlessly looping GIF; a preview, since GIF keeps only 256 colours."""
    return _save_frames([scaled(frame, height, colors=256) for frame in clip_FCHW], path, frames_per_second)


def _save_frames(frames: Sequence[Image.Image], path: Path, frames_per_second: float) -> Path:
    first, *others = frames
    options = {
        "save_all": True,
        "append_images": others,
        "duration": round(1000 / frames_per_second),
        "loop": 0,
    }
    with atomic(path) as temporary:
        first.save(temporary, format="GIF", **options)
    return path


def save_picture(picture: Image.Image, path: Path) -> Path:
    """Write a PNG that is either whole or absent."""
    with atomic(path) as temporary:
        picture.save(temporary, format="PNG", optimize=True)
    return path
