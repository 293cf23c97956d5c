"""Features of FVD: the I3D of Kinetics-400 as TorchScript, called as StyleGAN-V's and Latte's evaluation call it.

Axes: B clips, F frames, C channels, H height, W width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.metrics.frames import sample_frames
from viditq.metrics.once import one_for_all
from viditq.metrics.weights import read_torchscript

FILE = "i3d_torchscript.pt"
ORIGIN = f"{FILE} (linked from the universome/fvd-comparison repository on GitHub; TorchScript is code, so trust it)"
OFFLINE = "metric=fvd and metric=fvd_data need no file."
OPTIONS = {"rescale": True, "resize": True, "return_features": True}
CLIPS_AT_ONCE = 4
WANTED_BY = "FVD with I3D features"


class I3dFeatures(nn.Module):
    """The 400 class scores of a clip before the softmax. The file resizes to 224 x 224 and rescales 0..255 itself."""

    def __init__(self, network: Any, frames: int) -> None:
        super().__init__()
        self.network, self.frames = network, frames

    @torch.no_grad()
    def features(self, clips_BFCHW: Tensor) -> Tensor:
        """Clips in [0, 1] -> [B, D], each of `frames` frames (`sample_frames`); images raise UserError."""
        clips_BCFHW = (255 * sample_frames(clips_BFCHW, self.frames, WANTED_BY)).round().transpose(1, 2)
        found = [self.network(chunk, **OPTIONS) for chunk in clips_BCFHW.split(CLIPS_AT_ONCE)]
        if not all(isinstance(x, Tensor) and x.ndim == 2 for x in found):
            raise UserError(f"{WANTED_BY}: the file gives no [clips, features]. It is not {FILE}. {OFFLINE}")
        return torch.cat(found).float()


@one_for_all
def load_i3d(weights: str | None, frames: int = 16) -> I3dFeatures:
    """I3D from `weights`, which runs as code: load files that you trust. UserError if it is missing or another file."""
    return I3dFeatures(read_torchscript(weights, FILE, WANTED_BY, OFFLINE, ORIGIN, tuple(OPTIONS)), frames)
