"""Optical flow of clips: OpenCV's Farneback and DIS, which need no weights, and RAFT from a weights file.

A flow is the displacement in pixels from each pixel of a frame to where its content lies in the next frame: x to the
right in channel 0, y down in channel 1. Estimators resize small frames up and the flow back.
Axes: B clips, F frames, C channels, H height, W width, N = B (F - 1) pairs of frames.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from math import ceil
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from viditq.errors import UserError
from viditq.metrics.once import one_for_all
from viditq.metrics.weights import fill, read_weights

Flow = Callable[[Tensor], Tensor]
"""Float clips in [0, 1] [B, F, C, H, W] -> flow in pixels [B, F - 1, 2, H, W]."""

LUMA = (0.299, 0.587, 0.114)
RAFT_FILES = {"raft_large": "raft_large_C_T_SKHT_V2-ff5fadd5.pth", "raft_small": "raft_small_C_T_V2-01064c6d.pth"}
OFFLINE = "flow.method=farneback and flow.method=dis need no file."


def resized_flow(clips_BFCHW: Tensor, min_side: int, multiple: int, estimate: Callable[[Tensor], Tensor]) -> Tensor:
    """`estimate` on frames of at least `min_side` px and sides divisible by `multiple`, in pixels of the input.

    0 between frames that are equal: estimators find up to half a pixel of motion there.
    """
    flow_BF2HW = _resized(clips_BFCHW, min_side, multiple, estimate)
    changed_BF = (clips_BFCHW[:, 1:] != clips_BFCHW[:, :-1]).flatten(2).any(2)
    return flow_BF2HW.where(changed_BF[:, :, None, None, None], 0)


def _resized(clips_BFCHW: Tensor, min_side: int, multiple: int, estimate: Callable[[Tensor], Tensor]) -> Tensor:
    height, width = clips_BFCHW.shape[-2:]
    factor = max(1, ceil(min_side / min(height, width)))
    size = [ceil(factor * side / multiple) * multiple for side in (height, width)]
    if size == [height, width]:
        return estimate(clips_BFCHW)
    larger = F.interpolate(clips_BFCHW.flatten(0, 1), size=size, mode="bicubic").clamp(0, 1)
    flow = estimate(larger.unflatten(0, clips_BFCHW.shape[:2]))
    back = F.interpolate(flow.flatten(0, 1), size=(height, width), mode="area").unflatten(0, flow.shape[:2])
    return back * back.new_tensor([width / size[1], height / size[0]]).view(2, 1, 1)


def backward_flow(flow: Flow, clips_BFCHW: Tensor) -> Tensor:
    """The flow from each frame (but the first) to the one before, [B, F - 1, 2, H, W]."""
    return flow(clips_BFCHW.flip(1)).flip(1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """OpenCV cuts frames into a stripe per thread, and DIS gives another flow for each number of stripes."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


class OpenCVFlow(nn.Module):
    """A classic estimator on 8-bit luma, on the CPU; the flow returns to the device of the clips.

    `create()` gives a function of two uint8 frames [H, W] that returns float32 [H, W, 2].
    """

    def __init__(self, create: Callable[[], Callable[[Any, Any], Any]], min_side: int) -> None:
        super().__init__()
        self.create, self.min_side = create, min_side

    def forward(self, clips_BFCHW: Tensor) -> Tensor:
        """Flow in pixels [B, F - 1, 2, H, W], float32."""
        return resized_flow(clips_BFCHW, self.min_side, 1, self._estimate)

    def _estimate(self, clips_BFCHW: Tensor) -> Tensor:
        luma_BFHW = torch.einsum("bfchw,c->bfhw", clips_BFCHW.float(), clips_BFCHW.new_tensor(LUMA).float())
        frames = (255 * luma_BFHW).round().byte().cpu().numpy()
        with _one_thread():
            calculate = self.create()
            flows = [[calculate(*pair) for pair in pairwise(clip)] for clip in frames]
        return torch.from_numpy(np.array(flows)).movedim(-1, 2).to(clips_BFCHW.device)


def _farneback() -> Callable[[Any, Any], Any]:
    """Window 9: 5 is noisier, and 15 smears the motion of small things over what is around them."""
    options = {"pyr_scale": 0.5, "levels": 5, "winsize": 9, "iterations": 3, "poly_n": 7, "poly_sigma": 1.5, "flags": 0}
    return lambda a, b: cv2.calcOpticalFlowFarneback(a, b, None, **options)  # type: ignore[call-overload]


def _dis() -> Callable[[Any, Any], Any]:
    estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return lambda a, b: estimator.calc(a, b, None)  # type: ignore[call-overload]


class RaftFlow(nn.Module):
    """torchvision's RAFT; frames are resized to at least 128 px and multiples of 8, as it needs."""

    PAIRS_AT_ONCE = 16  # the correlation of all pixels with all others is kept for each pair

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def forward(self, clips_BFCHW: Tensor) -> Tensor:
        """Flow in pixels [B, F - 1, 2, H, W], float32."""
        return resized_flow(clips_BFCHW, 128, 8, self._estimate)

    @torch.no_grad()
    def _estimate(self, clips_BFCHW: Tensor) -> Tensor:
        signed = 2 * clips_BFCHW.float() - 1
        pairs = zip(*(x.flatten(0, 1).split(self.PAIRS_AT_ONCE) for x in (signed[:, :-1], signed[:, 1:])), strict=True)
        return torch.cat([self.network(a, b)[-1] for a, b in pairs]).unflatten(0, (len(signed), -1))


def _load_raft(method: str, weights: str | None) -> RaftFlow:
    try:
        build = getattr(importlib.import_module("torchvision.models.optical_flow"), method)
    except ImportError as error:
        raise UserError(
            f"flow.method={method} needs torchvision, which is not installed: pip install torchvision, of the release "
            f"that belongs to torch {torch.__version__}. {OFFLINE}"
        ) from error
    network = build(weights=None)
    wanted_by = f"flow.method={method}"
    fill(network, read_weights(weights, RAFT_FILES[method], wanted_by, OFFLINE), weights, wanted_by)
    return RaftFlow(network)


OPENCV: dict[str, Callable[[], OpenCVFlow]] = {
    "farneback": lambda: OpenCVFlow(_farneback, min_side=32),
    "dis": lambda: OpenCVFlow(_dis, min_side=64),
}


@one_for_all
def load_flow(method: str, weights: str | None = None) -> nn.Module:
    """The estimator called `method`: farneback, dis, raft_small or raft_large.

    Farneback is the more accurate one on small frames and hardly sees noise, DIS on frames of 128 px and more.
    `weights`: the file of RAFT, torchvision's .pth or .safetensors. Raises UserError for an unknown method, a
    missing or unsuitable file, or RAFT without torchvision.
    """
    if method in RAFT_FILES:
        return _load_raft(method, weights)
    if method not in OPENCV:
        raise UserError(f"flow.method is {method!r}. Use one of: {', '.join([*OPENCV, *RAFT_FILES])}.")
    if weights is not None:
        raise UserError(f"flow.method={method} has no weights, and flow.weights is {weights!r}. Leave it null.")
    return OPENCV[method]()
