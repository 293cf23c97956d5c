"""Flow against motion that is known: of rendered shapes, from their centres of mass, and of shifted textures."""

import sys
from types import ModuleType

import cv2
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from viditq.data.moving_shapes import BACKGROUNDS, SCENES, draw_scenes, labels, render
from viditq.errors import UserError
from viditq.metrics.flow import RaftFlow, backward_flow, load_flow, resized_flow

METHODS = ("farneback", "dis")


def cover(clips: Tensor, scenes: list) -> Tensor:
    """How much of each pixel is shape, up to a factor, [B, F, H, W]."""
    back = torch.tensor(list(BACKGROUNDS.values()))[labels(scenes)["background"]]
    return (clips - back[:, None, :, None, None]).abs().amax(2)


def true_motion(cover_BFHW: Tensor) -> Tensor:
    """Steps of the centre of mass in pixels, x and y, [B, F - 1, 2]."""
    weights = cover_BFHW / cover_BFHW.sum((2, 3), keepdim=True)
    pixels = torch.arange(cover_BFHW.shape[-1]).float()
    return torch.stack([weights.sum(2) @ pixels, weights.sum(3) @ pixels], -1).diff(dim=1)


@pytest.mark.parametrize(("method", "typical", "largest"), [("farneback", 0.06, 0.3), ("dis", 0.12, 1.0)])
def test_moving_shapes(method, typical, largest):
    generator = torch.Generator().manual_seed(0)
    scenes = [scene for scene in draw_scenes(60, generator) if scene.motion != 4]
    clips = render(scenes, generator)
    shape = cover(clips, scenes)
    truth = true_motion(shape)
    assert 1.8 < truth.norm(dim=-1).mean() < 2.3
    inside = (shape > 0.5 * shape.amax((1, 2, 3), keepdim=True))[:, :-1]
    error = (load_flow(method)(clips) - truth[..., None, None]).norm(dim=2)
    per_clip = (error * inside).sum((1, 2, 3)) / inside.sum((1, 2, 3))
    assert per_clip.mean() < typical and per_clip.max() < largest


@pytest.mark.parametrize("method", METHODS)
def test_standing_shapes_do_not_move(method):
    generator = torch.Generator().manual_seed(0)
    clips = render([scene for scene in SCENES if scene.motion == 4][::10], generator)
    assert load_flow(method)(clips).abs().mean() < 1e-3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sides", [(20, 24), (40, 40), (70, 130)])
def test_equal_frames_have_no_flow(method, sides):
    """Farneback's of noise is up to 0.57 px. Frames beside a moving pair keep theirs."""
    noise = torch.rand(2, 1, 3, *sides, generator=torch.Generator().manual_seed(0))
    frozen = noise.expand(-1, 4, -1, -1, -1)
    assert not load_flow(method)(frozen).any()
    moving = torch.cat([frozen, noise.roll(2, -1)], 1)
    flow = load_flow(method)(moving)
    assert not flow[:, :3].any() and flow[:, 3].abs().mean() > 0.1


def shifted(height: int, width: int, step: tuple[int, int], frames: int = 3) -> Tensor:
    """A smooth texture that moves by `step` = (x, y) pixels a frame, [1, F, 3, H, W]."""
    large = torch.rand(1, 3, height // 3 + 12, width // 3 + 12, generator=torch.Generator().manual_seed(4))
    texture = F.interpolate(large, scale_factor=4, mode="bicubic").clamp(0, 1)
    corners = [(12 - t * step[1], 12 - t * step[0]) for t in range(frames)]
    return torch.stack([texture[..., y : y + height, x : x + width] for y, x in corners], 1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sides", [(20, 20), (32, 32), (32, 56), (130, 70)])
@pytest.mark.parametrize("step", [(2, 0), (-1, 2)])
def test_shifted_textures(method, sides, step):
    clips = shifted(*sides, step)
    for estimate, sign in ((load_flow(method), 1), (lambda c: backward_flow(load_flow(method), c), -1)):
        flow = estimate(clips)
        assert flow.shape == (1, 2, 2, *sides) and flow.dtype == torch.float32
        middle = flow[..., 4:-4, 4:-4].movedim(2, -1)
        assert (middle - sign * torch.tensor(step)).norm(dim=-1).mean() < 0.15


@pytest.mark.parametrize("method", METHODS)
def test_very_small_frames(method):
    for sides in ((8, 8), (1, 5)):
        flow = load_flow(method)(torch.rand(2, 3, 3, *sides, generator=torch.Generator().manual_seed(0)))
        assert flow.shape == (2, 2, 2, *sides) and flow.isfinite().all()


def test_resizing_scales_the_flow_back():
    seen = []

    def estimate(clips: Tensor) -> Tensor:
        seen.append(clips)
        return torch.tensor([6.0, 4.0]).view(2, 1, 1).expand(2, 1, 2, *clips.shape[-2:])

    flow = resized_flow(torch.rand(2, 2, 3, 10, 21), 32, 8, estimate)
    assert seen[0].shape == (2, 2, 3, 40, 88) and seen[0].min() >= 0 and seen[0].max() <= 1
    torch.testing.assert_close(flow[:, :, 0], torch.full((2, 1, 10, 21), 6.0 * 21 / 88))
    torch.testing.assert_close(flow[:, :, 1], torch.full((2, 1, 10, 21), 4.0 * 10 / 40))
    large = torch.rand(1, 2, 3, 40, 48)
    resized_flow(large, 32, 8, estimate)
    assert seen[1] is large


@pytest.mark.parametrize("method", METHODS)
def test_threads_and_batches_change_nothing(method):
    clips = render(draw_scenes(3, torch.Generator().manual_seed(1)), torch.Generator().manual_seed(1), 4)
    flow, before = load_flow(method), cv2.getNumThreads()
    found = []
    try:
        for threads in (1, 3):
            cv2.setNumThreads(threads)
            found.append(flow(clips))
            assert cv2.getNumThreads() == threads
    finally:
        cv2.setNumThreads(before)
    assert torch.equal(*found)
    assert torch.equal(found[0], torch.cat([flow(clip[None]) for clip in clips]))


def test_refuses_with_the_remedy(monkeypatch):
    with pytest.raises(UserError, match="farneback, dis, raft_large, raft_small"):
        load_flow("horn")
    with pytest.raises(UserError, match="Leave it null"):
        load_flow("dis", "raft.pth")
    monkeypatch.setitem(sys.modules, "torchvision.models.optical_flow", None)
    with pytest.raises(UserError, match=r"needs torchvision.*flow\.method=dis need no file"):
        load_flow("raft_small", "raft.pth")


class FakeRaft(nn.Module):
    """Calls a flow what the first frame holds, so that the test sees what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, first: Tensor, second: Tensor) -> list[Tensor]:
        assert first.shape == second.shape and min(first.shape[-2:]) >= 128
        assert not any(side % 8 for side in first.shape[-2:]) and len(first) <= RaftFlow.PAIRS_AT_ONCE
        return [torch.zeros_like(first[:, :2]), self.factor * torch.cat([first[:, :1], second[:, :1]], 1)]


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("torchvision.models.optical_flow")
    fake.raft_small = lambda weights: FakeRaft()  # type: ignore[attr-defined]
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_raft_is_filled_from_its_file_and_given_what_it_needs(torchvision, tmp_path, suffix):
    path, tensors = tmp_path / f"raft.{suffix}", {"factor": torch.tensor([3.0])}
    torch.save(tensors, path) if suffix == "pth" else save_file(tensors, path)
    levels = torch.linspace(0, 1, 7)
    assert not load_flow("raft_small", str(path))(torch.rand(1, 1, 3, 33, 40).expand(2, 3, -1, -1, -1)).any()
    clips = levels.view(1, 7, 1, 1, 1).expand(3, 7, 3, 33, 40)
    flow = load_flow("raft_small", str(path))(clips)
    assert flow.shape == (3, 6, 2, 33, 40)
    # 33 x 40 is seen as 136 x 160.
    torch.testing.assert_close(flow[:, :, 0, 5, 5], (3 * (2 * levels[:-1] - 1) * 40 / 160).expand(3, 6))
    torch.testing.assert_close(flow[:, :, 1, 5, 5], (3 * (2 * levels[1:] - 1) * 33 / 136).expand(3, 6))


def test_raft_without_its_file(torchvision, tmp_path):
    for given, message in ((None, "are null"), (str(tmp_path / "no.pth"), "does not exist")):
        with pytest.raises(UserError, match=f"raft_small_C_T_V2-01064c6d.pth.*{message}.*download.pytorch.org.*dis"):
            load_flow("raft_small", given)
    torch.save({"other": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"another network.*factor"):
        load_flow("raft_small", str(tmp_path / "other.pth"))
