"""FVD over TorchScript: what the file is given, what is refused, and the distance against scipy in float64."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.metrics.frames import sample_frames
from viditq.metrics.frechet import FrechetDistance
from viditq.metrics.i3d import load_i3d


class LikeI3d(nn.Module):
    """The calling convention of the published file, over 6 random features of 8 x 8 px."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(192, 6, generator=torch.Generator().manual_seed(0)) / 14)

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        if not (rescale and resize and return_features):
            return x
        x = nn.functional.interpolate(x / 127.5 - 1, size=[x.size(2), 8, 8], mode="trilinear")
        time = torch.arange(x.size(2)).to(x.dtype).view(1, 1, -1, 1, 1) + 1
        return torch.tanh((x * time).sum(2).flatten(1) @ self.weight)


class Other(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def saved(network: nn.Module, path) -> str:
    torch.jit.script(network).save(str(path))
    return str(path)


def fvd(a: np.ndarray, b: np.ndarray) -> float:
    root = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    covariances = np.cov(a, rowvar=False) + np.cov(b, rowvar=False)
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covariances - 2 * root))


def test_fvd_is_scipys_over_the_features_of_the_file(pairs, tmp_path):
    batch, features = pairs(30, frames=16), load_i3d(saved(LikeI3d(), tmp_path / "i3d.pt"))
    by_hand = {}
    for side in ("samples", "references"):
        pixels = getattr(batch, side).transpose(1, 2).float()
        small = nn.functional.interpolate(pixels / 127.5 - 1, size=(16, 8, 8), mode="trilinear").double()
        weighted = np.einsum("bcthw,t->bchw", small.numpy(), np.arange(1, 17)).reshape(30, -1)
        by_hand[side] = np.tanh(weighted @ LikeI3d().weight.detach().double().numpy())
    metric = FrechetDistance(features, "reference", "FVD")
    metric.update(batch)
    assert metric.compute()["value"].item() == pytest.approx(fvd(*by_hand.values()), rel=1e-3)
    assert not any(p.requires_grad for p in features.parameters())


def test_one_clip_at_a_time_or_many(pairs, tmp_path):
    features, clips = load_i3d(saved(LikeI3d(), tmp_path / "i3d.pt")), pairs(9, frames=5).samples / 255
    together = features.features(clips)
    torch.testing.assert_close(together, torch.cat([features.features(clip[None]) for clip in clips]))


@pytest.mark.parametrize(
    ("found", "wanted", "expected"),
    [
        (8, 16, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]),
        (16, 16, list(range(16))),
        (32, 16, list(range(1, 32, 2))),
        (17, 4, [2, 6, 10, 14]),
        (3, 4, [0, 1, 1, 2]),
        (2, 1, [1]),
    ],
)
def test_clips_of_other_lengths(found, wanted, expected):
    clips = torch.arange(found).view(1, -1, 1, 1, 1).expand(2, -1, 3, 2, 2)
    assert sample_frames(clips, wanted, "FVD")[0, :, 0, 0, 0].tolist() == expected


def test_refuses_with_the_remedy(pairs, tmp_path):
    with pytest.raises(UserError, match=r"another network.*takes \(x\).*rescale, resize, return_features.*metric=fvd"):
        load_i3d(saved(Other(), tmp_path / "other.pt"))
    torch.save({"a": torch.ones(1)}, tmp_path / "tensors.pth")
    (tmp_path / "empty.pt").touch()
    for name in ("tensors.pth", "empty.pt"):
        with pytest.raises(UserError, match=r"no TorchScript.*i3d_torchscript\.pt.*trust it"):
            load_i3d(str(tmp_path / name))
    features = load_i3d(saved(LikeI3d(), tmp_path / "i3d.pt"))
    with pytest.raises(UserError, match="got images"):
        features.features(pairs(2, frames=1).samples / 255)
