"""The views and the scale of DOVER, by hand and against the official index arithmetic; files that do not fit."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.metrics.dover import DoverMetric, aesthetic_view, load_dover, rescaled, technical_views

MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1, 1)


def official_frames(frames: int, length: int, fragments: int, interval: int) -> list[int]:
    """`fragments` pieces of `length` frames, where each may start anywhere in its part: here in the middle of it."""
    starts = [frames // fragments * i for i in range(fragments)]
    room = frames // fragments - length * interval
    middle = room // 2 if room > 0 else 0
    return [(start + middle + j * interval) % frames for start in starts for j in range(length)]


def numbered(frames: int, height: int, width: int) -> Tensor:
    """Every pixel tells its frame (red), row (green) and column (blue)."""
    clip = torch.zeros(1, frames, 3, height, width)
    clip[:, :, 0] = torch.arange(frames).view(-1, 1, 1)
    clip[:, :, 1] = torch.arange(height).view(-1, 1)
    clip[:, :, 2] = torch.arange(width)
    return clip


@pytest.mark.parametrize("frames", [8, 16, 32, 51, 100, 250])
def test_frames_of_the_views(frames):
    clip = numbered(frames, 224, 224)
    seen = aesthetic_view(clip)[0] * STD + MEAN
    assert seen[0, :, 0, 0].round().int().tolist() == official_frames(frames, 1, 32, 2)
    views = technical_views(clip)
    assert views.shape == (1, 3, 3, 32, 224, 224)
    found = torch.cat([(view * STD + MEAN)[0, :, 0, 0].round().int() for view in views[0]])
    assert found.tolist() == official_frames(frames, 32, 3, 2)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (256, 455), (512, 512)])
def test_pixels_of_the_technical_view(height, width):
    view = technical_views(numbered(8, height, width))[0, 0] * STD + MEAN
    for axis, (channel, side) in enumerate(((1, height), (2, width))):
        line = view[channel, 0, :, 0] if axis == 0 else view[channel, 0, 0]
        cell = side // 7
        expected = [cell * i + (cell - 32) // 2 + j for i in range(7) for j in range(32)]
        assert line.round().int().tolist() == expected and max(expected) < side


def test_aesthetic_view_is_the_whole_frame_made_square():
    view = aesthetic_view(numbered(32, 448, 896))[0] * STD + MEAN
    assert view.shape == (3, 32, 224, 224)
    inner = torch.arange(10, 214)
    torch.testing.assert_close(view[1, 0, inner, 0], inner * 2 + 0.5, rtol=0, atol=1e-2)
    torch.testing.assert_close(view[2, 0, 0, inner], inner * 4 + 1.5, rtol=0, atol=1e-2)


def test_published_scale():
    def sigmoid(x: float) -> float:
        return 1 / (1 + np.exp(-x))

    technical, aesthetic = 0.15, -0.05
    t, a = (technical - 0.1107) / 0.07355, (aesthetic + 0.08285) / 0.03774
    found = rescaled({"aesthetic": torch.tensor([aesthetic]), "technical": torch.tensor([technical])})
    expected = {"technical": sigmoid(t), "aesthetic": sigmoid(a), "overall": sigmoid(0.6104 * t + 0.3896 * a)}
    assert {k: v.item() for k, v in found.items()} == pytest.approx({k: 100 * v for k, v in expected.items()}, rel=1e-5)


class LikeDover(nn.Module):
    """The calling convention of the official export; scores are maps, as its heads give them."""

    def forward(self, aes_view: Tensor, tech_view: Tensor) -> list[Tensor]:
        assert aes_view.shape == [1, 3, 32, 224, 224] and tech_view.shape == [3, 3, 32, 224, 224]
        return [aes_view[:, :1, :, ::32, ::32] / 30, tech_view[:, 1:2, :, ::32, ::32].abs() / 10]


def test_metric_over_the_file(pairs, tmp_path):
    torch.jit.script(LikeDover()).save(str(tmp_path / "dover.pt"))
    batch = pairs(2, frames=3, size=224)
    metric = DoverMetric(load_dover(str(tmp_path / "dover.pt")), "DOVER")
    metric.update(batch)
    result = metric.compute()
    scores: dict[str, list[Tensor]] = {"aesthetic": [], "technical": []}
    for clip in batch.references[batch.index.argsort()].float():
        scores["aesthetic"].append(((aesthetic_view(clip[None])[:, 0, :, ::32, ::32]) / 30).mean().double())
        scores["technical"].append(technical_views(clip[None])[0, :, 1, :, ::32, ::32].abs().mean().double() / 10)
    expected = rescaled({name: torch.stack(values) for name, values in scores.items()})
    torch.testing.assert_close(result["per_sample_reference"], expected["overall"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(result["reference_aesthetic"], expected["aesthetic"].mean(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(result["reference_technical"], expected["technical"].mean(), rtol=1e-5, atol=1e-4)
    assert 0 < result["value"] < 100 and result["value"] != result["reference_value"]


class OneView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_refuses_with_the_remedy(pairs, tmp_path):
    torch.jit.script(OneView()).save(str(tmp_path / "other.pt"))
    with pytest.raises(UserError, match=r"takes \(x\) and must take \(aes_view, tech_view\).*docs/metrics"):
        load_dover(str(tmp_path / "other.pt"))
    metric = DoverMetric(nn.Identity(), "DOVER")
    with pytest.raises(UserError, match="frames of 224 px"):
        metric.update(pairs(1, frames=4, size=223))
    with pytest.raises(UserError, match="got images"):
        metric.update(pairs(1, frames=1, size=224))
