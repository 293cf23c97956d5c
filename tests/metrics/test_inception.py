"""Inception against torch-fidelity's and torchmetrics' own, run once on weights of a fixed stream; FID on top."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance

from viditq.errors import UserError
from viditq.metrics.frechet import FrechetDistance
from viditq.metrics.inception import RESIZE, InceptionFeatures, load_inception

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "inception.safetensors"


@cache
def stream_weights() -> dict[str, Tensor]:
    """Weights by name, from one legacy numpy stream (which never changes) in the order of the sorted names."""
    shapes = {name: tensor.shape for name, tensor in InceptionFeatures("tensorflow").state_dict().items()}
    random, tensors = np.random.RandomState(0), {}
    for name in sorted(name for name in shapes if not name.endswith("num_batches_tracked")):
        values = random.standard_normal(shapes[name]).astype(np.float32)
        if name.endswith("conv.weight"):
            values *= (2 / np.prod(shapes[name][1:])) ** 0.5
        elif name.endswith(("running_var", "bn.weight")):
            values = 1 + 0.2 * np.abs(values)
        else:
            values *= 0.1
        tensors[name] = torch.from_numpy(values)
    return tensors


@pytest.mark.parametrize(
    ("resize", "expected", "factor"),
    [
        ("tensorflow", "tensorflow", 1),
        ("tensorflow", "tensorflow_of_8_times_as_large", 8),
        ("torchmetrics", "torchmetrics_of_8_times_as_large", 8),
    ],
)
def test_features_are_those_of_the_published_networks(resize, expected, factor, tmp_path):
    torch.save(stream_weights(), tmp_path / "inception.pth")
    network, golden = load_inception(str(tmp_path / "inception.pth"), resize), load_file(GOLDEN)
    images = golden["images"].repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    features = network.features(images[:, None] / 255)
    assert features.shape == (3, 2048)
    torch.testing.assert_close(features[:, ::8], golden[expected], rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_layers_are_those_of_the_file():
    """As torch-fidelity counts them: 94 convolutions with batch norm and the classifier of 1008 classes."""
    tensors = stream_weights()
    assert sum(name.endswith("conv.weight") for name in tensors) == 94
    assert tensors["fc.weight"].shape == (1008, 2048)
    assert sum(tensor.numel() for name, tensor in tensors.items() if "running" not in name) == 23_850_960
    assert tensors["Mixed_6c.branch7x7dbl_4.conv.weight"].shape == (160, 160, 7, 1)


def test_resizing_as_each_library_does_it():
    images = torch.rand(2, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    large = RESIZE["tensorflow"](images)
    assert large.shape == (2, 3, 299, 299)
    torch.testing.assert_close(large[..., 0, 0], images[..., 0, 0])
    y, x = 150 * 20 / 299, 200 * 30 / 299
    near, far = (images[:, :, int(y) : int(y) + 2, i] for i in (int(x), int(x) + 1))
    along = near + (far - near) * (x - int(x))
    torch.testing.assert_close(large[..., 150, 200], along[..., 0] + (along[..., 1] - along[..., 0]) * (y - int(y)))
    torch.testing.assert_close(large[..., 298, 298], images[..., -1, -1])  # beyond the last pixel it is that
    plain = F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False)
    torch.testing.assert_close(RESIZE["pytorch_fid"](images), plain)
    assert (plain - large).abs().max() > 0.1


class OfImages(torch.nn.Module):
    """Features as torchmetrics wants them, of uint8 images."""

    num_features = 12

    def __init__(self, features: torch.nn.Module) -> None:
        super().__init__()
        self.inner = features

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return self.inner.features(images_NCHW[:, None] / 255)


def test_fid_is_that_of_torchmetrics(pairs, tiny_features):
    batch = pairs(40, frames=1)
    theirs = FrechetInceptionDistance(feature=OfImages(tiny_features))
    theirs.update(batch.references[:, 0], real=True)
    theirs.update(batch.samples[:, 0], real=False)
    ours = FrechetDistance(tiny_features, "reference", "FID")
    ours.update(batch)
    assert ours.compute()["value"].item() == pytest.approx(theirs.compute().item(), rel=1e-2)


def test_refuses_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match="tensorflow, pytorch_fid, torchmetrics"):
        load_inception("file.pth", "bicubic")
    torch.save({**stream_weights(), "fc.weight": torch.ones(1000, 2048)}, tmp_path / "torchvision.pth")
    with pytest.raises(UserError, match=r"another network.*fc\.weight"):
        load_inception(str(tmp_path / "torchvision.pth"))
    with pytest.raises(UserError, match="metric=video_real"):
        InceptionFeatures("tensorflow").features(torch.zeros(1, 2, 3, 8, 8))
