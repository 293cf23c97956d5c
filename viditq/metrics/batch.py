"""What every metric is fed: clips of the quantized model beside the float model's, from the same noise.

Axes: B pairs, F frames (an image has F = 1), C channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sound:
    """The sound of B pairs, int16 [B, A, T] each: A audio channels of T values, `rate` of them a second."""

    samples: Tensor
    references: Tensor
    rate: int

    def __post_init__(self) -> None:
        for sounds in (self.samples, self.references):
            assert sounds.dtype == torch.int16 and sounds.ndim == 3, "sounds are int16 [B, A, T]"
        assert self.samples.shape == self.references.shape, "sounds of samples and references differ in shape"


@dataclass(frozen=True)
class EvalBatch:
    """B pairs; `samples`, `references` and `data` are uint8 [B, F, C, H, W], `index` is int64 [B].

    `references` are the float model's clips, `data` (where given) real clips of the training distribution,
    `given` (where prompts come with pictures) what sampling started from, uint8 [C, H, W] each,
    `sound` (where the model makes it and a metric reads it) what was made beside the frames,
    and `index` the number of each pair's prompt, which is its identity: no two pairs of a run share one.
    """

    samples: Tensor
    references: Tensor
    prompts: list[str]
    index: Tensor
    data: Tensor | None = None
    given: list[Tensor] | None = None
    sound: Sound | None = None

    def __post_init__(self) -> None:
        for clips in (self.samples, self.references, self.data):
            assert clips is None or (clips.dtype == torch.uint8 and clips.ndim == 5), "clips are uint8 [B, F, C, H, W]"
            assert clips is None or len(clips) == len(self.samples), "one clip of each kind per pair"
        assert self.given is None or len(self.given) == len(self.samples), "one picture per pair"
        assert self.sound is None or len(self.sound.samples) == len(self.samples), "one sound per pair"
        assert self.samples.shape == self.references.shape, "samples and references differ in shape"
        assert self.index.dtype == torch.int64 and self.index.shape == (len(self.samples),), "index is int64 [B]"
        assert len(self.prompts) == len(self.samples), "one prompt per pair"

    def to(self, device: torch.device) -> EvalBatch:
        """The same there; pictures, which a metric fetches where it reads them, stay."""
        return replace(_moved(self, device), sound=None if self.sound is None else _moved(self.sound, device))


def _moved(batch: Any, device: torch.device) -> Any:
    return replace(batch, **{name: v.to(device) for name, v in vars(batch).items() if isinstance(v, Tensor)})


def to_unit(clips: Tensor) -> Tensor:
    """uint8 0..255 as float32 0..1, same shape."""
    return clips.float() / 255
