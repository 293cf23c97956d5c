"""DOVER (Wu et al. 2023): technical and aesthetic quality of videos, from the official network as TorchScript.

The file is the official repository's network behind one function, `forward(aes_view, tech_view)`, which gives the two
scores; docs/metrics.md tells how to write it. The two views are made here.
Axes: B clips, F frames, V views of a clip, C channels, H height, W width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from viditq.errors import UserError
from viditq.metrics.batch import EvalBatch, to_unit
from viditq.metrics.streaming import PerSampleMetric
from viditq.metrics.weights import read_torchscript

FILE = "dover_torchscript.pt"
ORIGIN = (
    f"DOVER.pth from the VQAssessment/DOVER repository on GitHub, make {FILE} of it as docs/metrics.md says "
    "(TorchScript is code, so trust it)"
)
OFFLINE = "metric=flicker and metric=warping_error need no file."
WANTED_BY = "DOVER"
FRAMES, STRIDE, STARTS = 32, 2, 3  # a view has 32 frames; the technical ones take every other, from 3 places
GRID, PATCH = 7, 32
SIDE = GRID * PATCH
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
SCALES = {"aesthetic": (-0.08285, 0.03774, 0.3896), "technical": (0.1107, 0.07355, 0.6104)}  # mean, deviation, weight


def aesthetic_view(clips_BFCHW: Tensor) -> Tensor:
    """32 evenly spaced frames (of a clip with fewer: 32 times the first), made square: [B, C, 32, 224, 224]."""
    step = clips_BFCHW.shape[1] // FRAMES
    offset = (step - STRIDE) // 2 if step > STRIDE else 0
    frames = clips_BFCHW[:, torch.arange(FRAMES) * step + offset].flatten(0, 1)
    square = F.interpolate(frames, size=(SIDE, SIDE), mode="bilinear", antialias=True)
    return _normalised(square.unflatten(0, (len(clips_BFCHW), FRAMES)))


def technical_views(clips_BFCHW: Tensor) -> Tensor:
    """Three times 32 frames, cut to the middle 32 x 32 px of each cell of a grid of 7 x 7: [B, V, C, 32, 224, 224].

    Every other frame counts, from the start, the first and the second third on, and from the beginning again where the
    clip ends.
    """
    number, frames = clips_BFCHW.shape[:2]
    length = frames // STARTS
    offset = (length - FRAMES * STRIDE) // 2 if length > FRAMES * STRIDE else 0
    index = (torch.arange(STARTS)[:, None] * length + torch.arange(FRAMES) * STRIDE + offset) % frames
    rows, columns = (_cells(side) for side in clips_BFCHW.shape[-2:])
    cut = clips_BFCHW[..., rows[:, None], columns]
    return _normalised(cut[:, index.flatten()].unflatten(1, (STARTS, FRAMES)).flatten(0, 1)).unflatten(0, (number, -1))


def _cells(side: int) -> Tensor:
    """The 224 rows (or columns) of `side` that the middles of the cells hold."""
    cell = side // GRID
    starts = (torch.arange(GRID) * cell).clamp(max=side - PATCH) + max(0, (cell - PATCH) // 2)
    return (starts[:, None] + torch.arange(PATCH)).flatten()


def _normalised(clips_BFCHW: Tensor) -> Tensor:
    """[B, C, F, H, W] of clips in 0..255."""
    mean, std = (clips_BFCHW.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return ((clips_BFCHW - mean) / std).transpose(1, 2)


class Dover(nn.Module):
    """Both scores of clips, as the file gives them."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    @torch.no_grad()
    def forward(self, clips_BFCHW: Tensor) -> dict[str, Tensor]:
        """Clips in 0..255, frames of 224 px and more -> aesthetic and technical, [B] each."""
        views = zip(aesthetic_view(clips_BFCHW).split(1), technical_views(clips_BFCHW), strict=True)
        scores = [[score.double().mean() for score in self.network(*pair)] for pair in views]
        return dict(zip(SCALES, torch.tensor(scores, dtype=torch.float64).T, strict=True))


def load_dover(weights: str | None) -> Dover:
    """DOVER from its TorchScript, which runs as code: load files that you trust. UserError if it is missing."""
    return Dover(read_torchscript(weights, FILE, WANTED_BY, OFFLINE, ORIGIN, ("aes_view", "tech_view")))


def rescaled(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Percent, as published: 100 sigmoid((score - mean) / deviation) of each, and of their weighted sum."""
    logits = {name: (score - SCALES[name][0]) / SCALES[name][1] for name, score in scores.items()}
    logits["overall"] = torch.stack([SCALES[name][2] * logit for name, logit in logits.items()]).sum(0)
    return {name: 100 * logit.sigmoid() for name, logit in logits.items()}


class DoverMetric(PerSampleMetric):
    """DOVER's overall quality in percent; the float model's clips are scored as well.

    `compute` adds the means of its two halves, `aesthetic` and `technical` (published as VQA-aesthetic and
    VQA-technical), and of the float model's (`reference_aesthetic`, `reference_technical`).
    """

    higher_is_better = True

    def __init__(self, network: Dover, name: str) -> None:
        shares = tuple(f"{side}{half}" for side in ("", "reference_") for half in SCALES)
        super().__init__(name, unit="%", scores_references=True, shares=shares)
        self.network = network

    def scores(self, batch: EvalBatch) -> dict[str, Tensor]:
        """Two overall values per pair, and their halves, [B] each; images and small frames raise UserError."""
        frames, sides = batch.samples.shape[1], batch.samples.shape[-2:]
        if frames == 1:
            raise UserError(f"{self.name} judges videos and got images. Use metric=image or metric=image_real.")
        if min(sides) < SIDE:
            raise UserError(f"{self.name} needs frames of {SIDE} px, got {tuple(sides)}. Use metric=video.")
        found: dict[str, Tensor] = {}
        for column, side, clips in zip(
            self.columns, ("", "reference_"), (batch.samples, batch.references), strict=True
        ):
            values = rescaled(self.network(255 * to_unit(clips)))
            found |= {column: values["overall"], **{f"{side}{half}": values[half] for half in SCALES}}
        return found
