"""How a clip moves: optical flow beside the float model's, its length, flicker, and what warping cannot explain.

None of them says alone whether motion is right: a frozen clip has no flicker and no warping error. Axes: B clips,
F frames, C channels, H height, W width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from viditq.errors import UserError
from viditq.metrics.batch import EvalBatch, to_unit
from viditq.metrics.flow import backward_flow
from viditq.metrics.once import once
from viditq.metrics.streaming import PerSampleMetric

SIDES = ("samples", "references")
STEPS = 255  # 8-bit steps from black to white


def end_point_distance(flow_BF2HW: Tensor, other_BF2HW: Tensor) -> Tensor:
    """|u - v| in pixels, mean over pixels and frame steps (Baker et al. 2011, end-point error), [B]."""
    return (flow_BF2HW - other_BF2HW).double().norm(dim=2).flatten(1).mean(1)


def flow_length(flow_BF2HW: Tensor) -> Tensor:
    """|u| in pixels per frame step, mean over pixels and frame steps, [B]."""
    return flow_BF2HW.double().norm(dim=2).flatten(1).mean(1)


def flicker(clips_BFCHW: Tensor) -> Tensor:
    """|x_t+1 - x_t| of clips in [0, 1], mean over everything, in 8-bit steps, [B].

    VBench's temporal flickering (Huang et al. 2024) is (255 - this) / 255.
    """
    return STEPS * clips_BFCHW.double().diff(dim=1).abs().flatten(1).mean(1)


def sample_at(frames_NCHW: Tensor, flow_N2HW: Tensor) -> tuple[Tensor, Tensor]:
    """Frames read bilinearly at x + flow(x) [N, C, H, W], and where that lies inside the frame, bool [N, H, W]."""
    height, width = flow_N2HW.shape[-2:]
    y, x = torch.meshgrid(*(torch.arange(side, device=flow_N2HW.device) for side in (height, width)), indexing="ij")
    x_NHW, y_NHW = x + flow_N2HW[:, 0], y + flow_N2HW[:, 1]
    # A pixel is one wide: the frame ends half a pixel beyond the last centre.
    inside = (x_NHW >= -0.5) & (x_NHW <= width - 0.5) & (y_NHW >= -0.5) & (y_NHW <= height - 0.5)
    grid = torch.stack([2 * x_NHW / max(width - 1, 1) - 1, 2 * y_NHW / max(height - 1, 1) - 1], dim=-1)
    sampled = F.grid_sample(frames_NCHW, grid.to(frames_NCHW.dtype), padding_mode="border", align_corners=True)
    still_N1HW = (flow_N2HW == 0).all(1, keepdim=True)  # where rounding of the grid must not mix neighbours in
    return frames_NCHW.where(still_N1HW, sampled), inside


def visible(forward_N2HW: Tensor, backward_N2HW: Tensor) -> Tensor:
    """Where forward and backward flow lead back to the start, and stay inside the frame, bool [N, H, W].

    |u + v(x + u)|^2 < 0.01 (|u|^2 + |v(x + u)|^2) + 0.5 (Sundaram et al. 2010).
    """
    back, inside = sample_at(backward_N2HW, forward_N2HW)
    gap, lengths = (forward_N2HW + back).square().sum(1), forward_N2HW.square().sum(1) + back.square().sum(1)
    return inside & (gap < 0.01 * lengths + 0.5)


def warping_error(clips_BFCHW: Tensor, forward_BF2HW: Tensor, backward_BF2HW: Tensor) -> tuple[Tensor, Tensor]:
    """|x_t - x_t+1 warped back by the flow| in 8-bit steps over visible pixels, and the share of hidden ones, [B] each.

    As Lai et al. 2018, with the absolute instead of the squared error; mean over frame steps of each step's mean. A
    step without any visible pixel counts with all its pixels: its motion could not be followed at all.
    """
    steps = forward_BF2HW.shape[:2]
    forward, backward = forward_BF2HW.flatten(0, 1), backward_BF2HW.flatten(0, 1)
    warped, _ = sample_at(clips_BFCHW[:, 1:].flatten(0, 1), forward)
    error_NHW = STEPS * (clips_BFCHW[:, :-1].flatten(0, 1) - warped).double().abs().mean(1)
    seen = visible(forward, backward)
    counted = seen | ~seen.any(-1, keepdim=True).any(-2, keepdim=True)
    error = (error_NHW * counted).sum((1, 2)) / counted.sum((1, 2))
    hidden = 1 - seen.double().mean((1, 2))
    return error.view(steps).mean(1), hidden.view(steps).mean(1)


def flow_of(flow: nn.Module, batch: EvalBatch, side: str) -> Tensor:
    """The flow of samples or references, [B, F - 1, 2, H, W], once for all metrics with this estimator."""
    return once(batch, ("flow", side, flow), lambda: flow(to_unit(getattr(batch, side))))


class MotionMetric(PerSampleMetric):
    """A per-sample metric of video; images raise UserError."""

    def update(self, batch: EvalBatch) -> None:
        """Score the pairs of `batch`."""
        if batch.samples.shape[1] < 2:
            raise UserError(
                f"{self.name} looks at motion and got images. Use metric=image, or more frames (model.num_frames)."
            )
        super().update(batch)


class FlowScore(MotionMetric):
    """How far the motion is from the float model's: distance of the two optical flows, in pixels per frame step."""

    higher_is_better = False

    def __init__(self, flow: nn.Module, name: str) -> None:
        super().__init__(name, unit="px")
        self.flow = flow

    def scores(self, batch: EvalBatch) -> dict[str, Tensor]:
        """One value per pair, [B]."""
        flows = [flow_of(self.flow, batch, side) for side in SIDES]
        return {"per_sample": end_point_distance(*flows)}


class MotionMagnitude(MotionMetric):
    """How much moves: mean length of the optical flow in pixels per frame step, of samples and references.

    A frozen clip has none and a jittering one too much: only closeness to the float model's value counts.
    """

    higher_is_better = None

    def __init__(self, flow: nn.Module, name: str) -> None:
        super().__init__(name, unit="px", scores_references=True)
        self.flow = flow

    def scores(self, batch: EvalBatch) -> dict[str, Tensor]:
        """Two values per pair, [B] each."""
        sides = zip(self.columns, SIDES, strict=True)
        return {column: flow_length(flow_of(self.flow, batch, side)) for column, side in sides}


class TemporalFlicker(MotionMetric):
    """Mean absolute change between adjacent frames in 8-bit steps, of samples and references.

    Motion changes pixels as well, and a frozen clip has none: only closeness to the float model's value counts.
    """

    higher_is_better = None

    def __init__(self, name: str) -> None:
        super().__init__(name, unit="/255", scores_references=True)

    def scores(self, batch: EvalBatch) -> dict[str, Tensor]:
        """Two values per pair, [B] each."""
        clips = zip(self.columns, (batch.samples, batch.references), strict=True)
        return {column: flicker(to_unit(c)) for column, c in clips}


class WarpingError(MotionMetric):
    """What of the change between adjacent frames is no motion, in 8-bit steps, of samples and references.

    `compute` adds `hidden` and `reference_hidden`, the shares of pixels that were left out because forward and
    backward flow disagree there. A frozen clip scores 0: read it beside the float model's own value.
    """

    higher_is_better = False

    def __init__(self, flow: nn.Module, name: str) -> None:
        super().__init__(name, unit="/255", scores_references=True, shares=("hidden", "reference_hidden"))
        self.flow = flow

    def scores(self, batch: EvalBatch) -> dict[str, Tensor]:
        """Error and hidden share of each sample and reference, [B] each."""
        (sample, hidden), (reference, reference_hidden) = (self._score(batch, side) for side in SIDES)
        errors = dict(zip(self.columns, (sample, reference), strict=True))
        return errors | {"hidden": hidden, "reference_hidden": reference_hidden}

    def _score(self, batch: EvalBatch, side: str) -> tuple[Tensor, Tensor]:
        clips_BFCHW = to_unit(getattr(batch, side))
        return warping_error(clips_BFCHW, flow_of(self.flow, batch, side), backward_flow(self.flow, clips_BFCHW))
