"""LPIPS against torchmetrics' own, over the same random network."""

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.functional.image import lpips as theirs

from viditq.errors import UserError
from viditq.metrics.batch import EvalBatch
from viditq.metrics.lpips import Lpips, LpipsMetric, load_lpips


def torchvision_features(backbone: str) -> nn.Sequential:
    """The layers as torchvision's documentation of AlexNet and VGG16 ("D") lists them."""
    if backbone == "vgg":
        layers: list[nn.Module] = []
        channels = [3]
        for size in [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]:
            if size == "M":
                layers += [nn.MaxPool2d(kernel_size=2, stride=2)]
            else:
                layers += [nn.Conv2d(channels[-1], size, kernel_size=3, padding=1), nn.ReLU(inplace=True)]
                channels.append(size)
        return nn.Sequential(*layers)
    return nn.Sequential(
        nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(64, 192, kernel_size=5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(192, 384, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
    )


def random_file(backbone: str, path) -> nn.Sequential:
    """A checkpoint as torchvision writes it, classifier and all; returns its features."""
    torch.manual_seed(5)
    features = torchvision_features(backbone)
    tensors = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    tensors["classifier.1.weight"] = torch.ones(2, 2)
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return features


def frames(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("backbone", "size", "suffix"), [("alex", 40, "pth"), ("vgg", 32, "safetensors")])
def test_is_that_of_torchmetrics(backbone, size, suffix, tmp_path, monkeypatch):
    path = tmp_path / f"weights.{suffix}"
    features = random_file(backbone, path)
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *_: features)
    a, b = frames(3, size), frames(3, size, seed=1)
    expected = theirs._NoTrainLpips(net=backbone)(a, b, normalize=True).flatten()
    ours = load_lpips(backbone, str(path))(a, b)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)
    assert (ours > 1e-3).all()


def test_mean_over_frames(pairs, lpips_of):
    network, batch = lpips_of("vgg"), pairs(3, frames=15, size=16)  # 45 frames: two chunks
    metric = LpipsMetric(network, "LPIPS")
    metric.update(batch)
    result = metric.compute()
    for row, index in enumerate(batch.index.tolist()):
        expected = network(batch.samples[row] / 255, batch.references[row] / 255).mean()
        torch.testing.assert_close(result["per_sample"][result["index"].tolist().index(index)].float(), expected)
    same = EvalBatch(batch.samples, batch.samples, batch.prompts, batch.index)
    metric.reset()
    metric.update(same)
    assert metric.compute()["value"] == 0


def test_smallest_frames(pairs, lpips_of):
    for backbone, size in (("alex", 31), ("vgg", 16)):
        metric = LpipsMetric(lpips_of(backbone), "LPIPS")
        metric.update(pairs(2, frames=1, size=size))
        assert metric.compute()["value"].isfinite()
        with pytest.raises(UserError, match=f"frames of {size} px"):
            metric.update(pairs(2, frames=1, size=size - 1))


def test_files_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="alex, vgg"):
        load_lpips("resnet", None)
    for given, message in ((None, "are null"), (str(tmp_path / "a.pth"), "does not exist")):
        with pytest.raises(UserError, match=rf"alexnet-owt-7be5be79\.pth.*{message}.*ssim and relative_l2"):
            load_lpips("alex", given)
    random_file("alex", tmp_path / "alex.pth")
    with pytest.raises(UserError, match="another network"):
        load_lpips("vgg", str(tmp_path / "alex.pth"))


def test_the_network_is_not_trained(lpips_of):
    network: Lpips = lpips_of("alex")
    assert not any(p.requires_grad for p in network.parameters())
    assert [tuple(head.shape) for head in network.heads] == [(c, 1, 1) for c in (64, 192, 384, 256, 256)]
