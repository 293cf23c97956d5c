"""Clips as networks want them that read a fixed number of frames. Axes: B clips, F frames, C, H, W."""

import torch
from torch import Tensor

from viditq.errors import UserError


def sample_frames(clips_BFCHW: Tensor, frames: int, wanted_by: str) -> Tensor:
    """`frames` frames, evenly spaced over the whole clip: number i is frame floor((i + 1/2) F / frames).

    A longer clip is thinned out, in a shorter one frames are repeated, one of that length is itself. An image raises
    UserError.
    """
    found = clips_BFCHW.shape[1]
    if found == 1:
        raise UserError(f"{wanted_by} looks at motion and got images. Use metric=image or metric=image_real.")
    if found == frames:
        return clips_BFCHW
    index = ((torch.arange(frames, device=clips_BFCHW.device) + 0.5) * found / frames).long()
    return clips_BFCHW[:, index]
