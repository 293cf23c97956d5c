"""What every metric is fed: clips of the quantized model beside the float model's, from the same noise.

Axes: B pairs, F frames (an image has F = 1), C channels, H height, W width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EvalBatch:
    """B pairs; `samples`, `references` and `data` are uint8 [B, F, C, H, W], `index` is int64 [B].

    `references` are the float model's clips, `data` (where given) real clips of the training distribution,
    `given` (where prompts come with pictures) what sampling started from, uint8 [C, H, W] each,
    and `index` the number of each pair's prompt, which is its identity: no two pairs of a run share one.
    """

    samples: Tensor
    references: Tensor
    prompts: list[str]
    index: Tensor
    data: Tensor | None = None
    given: list[Tensor] | None = None

    def __post_init__(self) -> None:
        for clips in (self.samples, self.references, self.data):
            assert clips is None or (clips.dtype == torch.uint8 and clips.ndim == 5), "clips are uint8 [B, F, C, H, W]"
            assert clips is None or len(clips) == len(self.samples), "one clip of each kind per pair"
        assert self.given is None or len(self.given) == len(self.samples), "one picture per pair"
        assert self.samples.shape == self.references.shape, "samples and references differ in shape"
        assert self.index.dtype == torch.int64 and self.index.shape == (len(self.samples),), "index is int64 [B]"
        assert len(self.prompts) == len(self.samples), "one prompt per pair"


def to_unit(clips: Tensor) -> Tensor:
    """uint8 0..255 as float32 0..1, same shape."""
    return clips.float() / 255
