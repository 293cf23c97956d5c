"""LPIPS (Zhang et al. 2018): distance of deep features of AlexNet or VGG16, from torchvision's weights file.

torchmetrics' LPIPS takes its network from torchvision; here it is built in torch, so that a file is all it needs. The
linear heads are those that come with torchmetrics. Axes: N frames, B clips, F frames, C channels, H height, W width.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torchmetrics
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.metrics.batch import EvalBatch, to_unit
from viditq.metrics.streaming import PerSampleMetric
from viditq.metrics.weights import fill, read_weights

FILES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}
TAPS = {"alex": (2, 5, 8, 10, 12), "vgg": (4, 9, 16, 23, 30)}  # features are read before these layers
SMALLEST = {"alex": 31, "vgg": 16}  # below it a pooling layer has nothing to pool
VGG_CHANNELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in [-1, 1]
FRAMES_AT_ONCE = 32
OFFLINE = "ssim and relative_l2 need no file: metric=[psnr,ssim,relative_l2]."


def _alex() -> list[nn.Module]:
    def relu_pool() -> list[nn.Module]:
        return [nn.ReLU(), nn.MaxPool2d(3, stride=2)]

    layers = [nn.Conv2d(3, 64, 11, stride=4, padding=2), *relu_pool(), nn.Conv2d(64, 192, 5, padding=2), *relu_pool()]
    for channels in ((192, 384), (384, 256), (256, 256)):
        layers += [nn.Conv2d(*channels, 3, padding=1), nn.ReLU()]
    return layers


def _vgg() -> list[nn.Module]:
    layers: list[nn.Module] = []
    before = 3
    for block in VGG_CHANNELS:
        for channels in block:
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
            before = channels
        layers.append(nn.MaxPool2d(2, stride=2))
    return layers[:-1]


class Lpips(nn.Module):
    """`backbone`: "alex" or "vgg"; `features` has torchvision's layer numbers."""

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.features = nn.Sequential(*(_alex() if backbone == "alex" else _vgg()))
        self.heads = nn.ParameterList(_heads(backbone))
        for name, values in (("shift", SHIFT), ("scale", SCALE)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def _unit_features(self, frames_NCHW: Tensor) -> list[Tensor]:
        """Activations of each tap, of length 1 in every pixel."""
        x, found = (2 * frames_NCHW - 1 - self.shift) / self.scale, []
        for start, end in pairwise((0, *TAPS[self.backbone])):
            x = self.features[start:end](x)
            found.append(x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return found

    def forward(self, frames_NCHW: Tensor, others_NCHW: Tensor) -> Tensor:
        """Distance of frames in [0, 1], [N]: sum over taps of the weighted squared difference, mean over pixels."""
        pairs = zip(self.heads, self._unit_features(frames_NCHW), self._unit_features(others_NCHW), strict=True)
        return torch.stack([((a - b).square() * head).sum(1).mean((1, 2)) for head, a, b in pairs]).sum(0)


def _heads(backbone: str) -> Sequence[Tensor]:
    """The learned weight of each channel, [C, 1, 1] per tap."""
    file = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / f"{backbone}.pth"
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    return [tensors[f"lin{tap}.model.1.weight"][0] for tap in range(len(TAPS[backbone]))]


def load_lpips(backbone: str, weights: str | None) -> Lpips:
    """Build LPIPS from `weights`, torchvision's file of the backbone (.pth, or the same as .safetensors).

    Raises UserError for an unknown backbone, or a file that is missing or belongs to another network.
    """
    if backbone not in FILES:
        raise UserError(f"The backbone of LPIPS is {backbone!r}. Use one of: {', '.join(FILES)}.")
    wanted_by = f"LPIPS with backbone={backbone}"
    tensors = read_weights(weights, FILES[backbone], wanted_by, OFFLINE)
    network = Lpips(backbone)
    own = {k.removeprefix("features."): v for k, v in tensors.items() if k.startswith("features.")}
    fill(network.features, own, weights, wanted_by)
    return network


class LpipsMetric(PerSampleMetric):
    """LPIPS between a sample and the float model's, mean over frames."""

    higher_is_better = False

    def __init__(self, network: Lpips, name: str) -> None:
        super().__init__(name, unit="")
        self.network = network

    def scores(self, batch: EvalBatch) -> dict[str, Tensor]:
        """One value per pair, [B]; frames that are too small raise UserError."""
        smallest, sides = SMALLEST[self.network.backbone], batch.samples.shape[-2:]
        if min(sides) < smallest:
            raise UserError(f"{self.name} needs frames of {smallest} px, got {tuple(sides)}. Use metric=[psnr,ssim].")
        frames = (to_unit(x).flatten(0, 1).split(FRAMES_AT_ONCE) for x in (batch.samples, batch.references))
        values = [self.network(s, r) for s, r in zip(*frames, strict=True)]
        return {"per_sample": torch.cat(values).view(batch.samples.shape[:2]).double().mean(1)}
