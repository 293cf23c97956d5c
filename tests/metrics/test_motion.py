"""Motion metrics against numpy and scipy."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor
from torchmetrics import Metric

from viditq.errors import UserError
from viditq.metrics.batch import EvalBatch
from viditq.metrics.flow import backward_flow, load_flow
from viditq.metrics.motion import (
    FlowScore,
    MotionMagnitude,
    TemporalFlicker,
    WarpingError,
    end_point_distance,
    flicker,
    flow_length,
    visible,
    warping_error,
)

FLOW = load_flow("farneback")
METRICS: dict[str, Callable[[], Metric]] = {
    "flow_score": lambda: FlowScore(FLOW, "flow score"),
    "motion_magnitude": lambda: MotionMagnitude(FLOW, "motion magnitude"),
    "flicker": lambda: TemporalFlicker("temporal flicker"),
    "warping_error": lambda: WarpingError(FLOW, "warping error"),
}


def result_of(name: str, batch: EvalBatch) -> dict[str, Tensor]:
    metric = METRICS[name]()
    metric.update(batch)
    return metric.compute()


def random_flow(*shape: int, length: float = 1.5, seed: int = 0) -> Tensor:
    return length * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_flow_distances_by_hand():
    u, v = random_flow(2, 3, 2, 5, 4), random_flow(2, 3, 2, 5, 4, seed=1)
    a, b = u.double().numpy(), v.double().numpy()
    lengths = np.array([[np.hypot(*step) for step in clip] for clip in a])
    np.testing.assert_allclose(flow_length(u), lengths.reshape(2, -1).mean(1), rtol=1e-6)
    gaps = np.sqrt((a[:, :, 0] - b[:, :, 0]) ** 2 + (a[:, :, 1] - b[:, :, 1]) ** 2)
    np.testing.assert_allclose(end_point_distance(u, v), gaps.reshape(2, -1).mean(1), rtol=1e-6)


def test_flicker_by_hand(pairs):
    clips = pairs(3).samples
    integers = clips.numpy().astype(int)
    expected = [np.mean([np.abs(b - a).mean() for a, b in pairwise(clip)]) for clip in integers]
    np.testing.assert_allclose(flicker(clips / 255), expected, rtol=1e-5)


def by_scipy(clip: np.ndarray, forward: np.ndarray, backward: np.ndarray) -> tuple[float, float]:
    """Warping error and hidden share of one clip [F, C, H, W], pixel coordinates and interpolation by scipy."""
    height, width = clip.shape[-2:]
    rows, columns = np.mgrid[:height, :width].astype(float)
    errors, hidden = [], []
    for now, after, (ux, uy), back in zip(clip, clip[1:], forward, backward, strict=False):
        to = [rows + uy, columns + ux]
        read = lambda image, to=to: map_coordinates(image, to, order=1, mode="nearest")  # noqa: E731
        vx, vy = read(back[0]), read(back[1])
        limit = 0.01 * (ux**2 + uy**2 + vx**2 + vy**2) + 0.5
        seen = (ux + vx) ** 2 + (uy + vy) ** 2 < limit
        seen &= (to[0] >= -0.5) & (to[0] <= height - 0.5) & (to[1] >= -0.5) & (to[1] <= width - 0.5)
        error = np.mean([np.abs(a - read(b)) for a, b in zip(now, after, strict=True)], axis=0)
        errors.append(255 * (error[seen].mean() if seen.any() else error.mean()))
        hidden.append(1 - seen.mean())
    return float(np.mean(errors)), float(np.mean(hidden))


@pytest.mark.parametrize("disagreement", [0.0, 0.4, 30.0])
def test_warping_error_is_that_of_scipy(pairs, disagreement):
    clips = pairs(2).samples.float() / 255
    forward = random_flow(2, 3, 2, 20, 20)
    backward = -forward + disagreement * random_flow(2, 3, 2, 20, 20, length=1, seed=1)
    found = torch.stack(warping_error(clips, forward, backward), 1)
    double = (x.double().numpy() for x in (clips, forward, backward))
    np.testing.assert_allclose(found, [by_scipy(*x) for x in zip(*double, strict=True)], rtol=1e-4)


def test_what_leaves_the_frame_or_does_not_come_back_is_hidden():
    forward = torch.zeros(1, 2, 4, 6)
    forward[:, 0] = 2.0
    seen = visible(forward, -forward)
    assert seen[0, :, :4].all() and not seen[0, :, 4:].any()
    assert not visible(forward, forward).any()


def test_where_all_is_hidden_every_pixel_counts():
    clips = torch.rand(1, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    away = torch.full((1, 2, 2, 8, 8), 100.0)
    error, hidden = warping_error(clips, away, away)
    edges = clips[:, 1:, :, 7:, 7:]  # all of it is read at the last pixel
    assert hidden == 1
    torch.testing.assert_close(error, 255 * (clips[:, :-1] - edges).abs().mean().double()[None], rtol=1e-5, atol=0)
    still = torch.zeros(1, 2, 2, 8, 8)
    mixed = [torch.stack([x[:, 0], y[:, 0]], 1) for x, y in ((away, still), (away, still))]
    error, hidden = warping_error(clips, *mixed)
    expected = ((clips[:, 0] - edges[:, 0]).abs().mean() + clips[:, 1:].diff(dim=1).abs().mean()) / 2
    torch.testing.assert_close(error.item(), 255 * expected.item(), rtol=1e-5, atol=0)
    assert hidden == 0.5


def test_metrics_score_samples_and_references_by_the_formulas(pairs):
    batch = pairs(3, frames=3, size=24)
    order = batch.index.argsort()
    samples, references = ((x / 255)[order] for x in (batch.samples, batch.references))
    u, v = FLOW(samples), FLOW(references)
    warped = [warping_error(c, f, backward_flow(FLOW, c)) for c, f in ((samples, u), (references, v))]
    expected = {
        "flow_score": (end_point_distance(u, v), None),
        "motion_magnitude": (flow_length(u), flow_length(v)),
        "flicker": (flicker(samples), flicker(references)),
        "warping_error": (warped[0][0], warped[1][0]),
    }
    for name, (of_samples, of_references) in expected.items():
        result = result_of(name, batch)
        torch.testing.assert_close(result["per_sample"], of_samples)
        assert result["value"] == pytest.approx(of_samples.mean().item())
        assert ("per_sample_reference" in result) == (of_references is not None)
        if of_references is not None:
            torch.testing.assert_close(result["per_sample_reference"], of_references)
    result = result_of("warping_error", batch)
    torch.testing.assert_close(result["hidden"], warped[0][1].mean())
    torch.testing.assert_close(result["reference_hidden"], warped[1][1].mean())


@pytest.mark.parametrize("name", METRICS)
def test_images_have_no_motion(name, pairs):
    with pytest.raises(UserError, match="metric=image"):
        METRICS[name]().update(pairs(2, frames=1))


@pytest.mark.parametrize("method", ["farneback", "dis"])
def test_a_frozen_clip_has_no_motion_and_no_warping_error(method):
    clips = torch.randint(0, 256, (2, 1, 3, 40, 37), generator=torch.Generator().manual_seed(0)).byte()
    batch = EvalBatch(clips.expand(-1, 3, -1, -1, -1), clips.expand(-1, 3, -1, -1, -1), ["", ""], torch.arange(2))
    flow = load_flow(method)
    for metric in (FlowScore(flow, "f"), MotionMagnitude(flow, "m"), TemporalFlicker("t"), WarpingError(flow, "w")):
        metric.update(batch)
        assert not metric.compute()["per_sample"].any(), metric.name
    assert metric.compute()["hidden"] == 0


def test_directions():
    better = {name: make().higher_is_better for name, make in METRICS.items()}
    assert better == {"flow_score": False, "motion_magnitude": None, "flicker": None, "warping_error": False}
