"""The Inception-v3 of FID: TensorFlow's network of 2015, from the file that torchmetrics and pytorch-fid use.

torchmetrics takes it from torch-fidelity, which needs torchvision and unpickles the file; here it is built in torch,
with the layer names of the file. Axes: B clips, C channels, H height, W width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from viditq.errors import UserError
from viditq.metrics.once import one_for_all
from viditq.metrics.weights import fill, read_weights

FILE = "weights-inception-2015-12-05-6726825d.pth"
ORIGIN = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
OFFLINE = "metric=fid and metric=fid_data need no file."
SIDE = 299
IMAGES_AT_ONCE = 16

Kernel = int | tuple[int, int]
Layer = tuple[str, int, Kernel] | tuple[str, int, Kernel, int]  # name, channels out, kernel, stride (1)
Path = list[Layer | list[Layer]]  # layers in a row; those of a list stand side by side at its end


def _a(pool: int) -> list[Path]:
    return [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        [("branch_pool", pool, 1)],
    ]


def _c(inner: int) -> list[Path]:
    row, column = (1, 7), (7, 1)
    kernels: tuple[Kernel, ...] = (1, column, row, column)
    twice: Path = [(f"branch7x7dbl_{i}", inner, kernel) for i, kernel in enumerate(kernels, 1)]
    return [
        [("branch1x1", 192, 1)],
        [("branch7x7_1", inner, 1), ("branch7x7_2", inner, row), ("branch7x7_3", 192, column)],
        [*twice, ("branch7x7dbl_5", 192, row)],
        [("branch_pool", 192, 1)],
    ]


B: list[Path] = [
    [("branch3x3", 384, 3, 2)],
    [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
    [],
]
D: list[Path] = [
    [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
    [
        ("branch7x7x3_1", 192, 1),
        ("branch7x7x3_2", 192, (1, 7)),
        ("branch7x7x3_3", 192, (7, 1)),
        ("branch7x7x3_4", 192, 3, 2),
    ],
    [],
]
E: list[Path] = [
    [("branch1x1", 320, 1)],
    [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]],
    [
        ("branch3x3dbl_1", 448, 1),
        ("branch3x3dbl_2", 384, 3),
        [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))],
    ],
    [("branch_pool", 192, 1)],
]


class _Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, channels_in: int, channels_out: int, kernel: Kernel, stride: int, padding: Kernel) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _average(x: Tensor) -> Tensor:
    """TensorFlow's average does not count what lies outside."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


class _Block(nn.Module):
    """Paths side by side; the last one starts with `pool`. Unstrided layers keep the size, strided ones do not pad."""

    def __init__(self, channels_in: int, paths: list[Path], pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.paths, self.pool = paths, pool
        for path in paths:
            channels = channels_in
            for step in path:
                for layer in step if isinstance(step, list) else [step]:
                    self.add_module(layer[0], _layer(channels, layer))
                channels = channels if isinstance(step, list) else step[1]

    def forward(self, x: Tensor) -> Tensor:
        starts = [x] * (len(self.paths) - 1) + [self.pool(x)]
        return torch.cat([self._run(path, start) for path, start in zip(self.paths, starts, strict=True)], 1)

    def _run(self, path: Path, x: Tensor) -> Tensor:
        for step in path:
            if isinstance(step, list):
                x = torch.cat([self.get_submodule(layer[0])(x) for layer in step], 1)
            else:
                x = self.get_submodule(step[0])(x)
        return x


def _layer(channels_in: int, layer: Layer) -> _Conv:
    kernel, stride = layer[2], layer[3] if len(layer) == 4 else 1
    same = kernel // 2 if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)
    return _Conv(channels_in, layer[1], kernel, stride, same if stride == 1 else 0)


def _to_tensorflow(frames_NCHW: Tensor) -> Tensor:
    """Bilinear as TensorFlow 1 does it: pixel i of the output lies at i x (in / out), nothing is smoothed."""
    rows, columns = (_interpolation(size).to(frames_NCHW) for size in frames_NCHW.shape[-2:])
    return rows @ frames_NCHW @ columns.T


def _interpolation(size: int) -> Tensor:
    """[299, size] weights."""
    position = torch.arange(SIDE, dtype=torch.float64) * size / SIDE
    low = position.long()
    weights = torch.zeros(SIDE, size, dtype=torch.float64)
    for index, share in ((low, 1 - (position - low)), ((low + 1).clamp(max=size - 1), position - low)):
        weights[torch.arange(SIDE), index] += share
    return weights


RESIZE: dict[str, Callable[[Tensor], Tensor]] = {
    "tensorflow": _to_tensorflow,
    "pytorch_fid": lambda x: F.interpolate(x, size=(SIDE, SIDE), mode="bilinear"),
    "torchmetrics": lambda x: F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", antialias=True),
}


class InceptionFeatures(nn.Module):
    """2048 features of an image, after the last pooling. `resize`: a key of RESIZE, how images become 299 x 299."""

    def __init__(self, resize: str) -> None:
        super().__init__()
        self.resize = RESIZE[resize]
        stem = [("1a_3x3", 3, 32, 3, 2, 0), ("2a_3x3", 32, 32, 3, 1, 0), ("2b_3x3", 32, 64, 3, 1, 1)]
        self.stem = [f"Conv2d_{name}" for name, *_ in stem]
        more = [("3b_1x1", 64, 80, 1, 1, 0), ("4a_3x3", 80, 192, 3, 1, 0)]
        self.more = [f"Conv2d_{name}" for name, *_ in more]
        for name, *layer in stem + more:
            self.add_module(f"Conv2d_{name}", _Conv(*layer))
        blocks = {"5b": (192, _a(32), _average), "5c": (256, _a(64), _average), "5d": (288, _a(64), _average)}
        blocks |= {"6a": (288, B, _halve)}
        blocks |= {f"6{n}": (768, _c(c), _average) for n, c in zip("bcde", (128, 160, 160, 192), strict=True)}
        blocks |= {"7a": (768, D, _halve), "7b": (1280, E, _average), "7c": (2048, E, _maximum)}
        self.mixed = [f"Mixed_{name}" for name in blocks]
        for name, block in blocks.items():
            self.add_module(f"Mixed_{name}", _Block(*block))
        self.fc = nn.Linear(2048, 1008)  # of no use here, and in the file
        self.eval().requires_grad_(False)

    def features(self, clips_BFCHW: Tensor) -> Tensor:
        """Images (clips of one frame) in [0, 1] -> [B, 2048]; videos raise UserError."""
        if clips_BFCHW.shape[1] != 1:
            raise UserError("FID with Inception features is for images and got videos. Use metric=video_real.")
        return torch.cat([self._pooled(chunk) for chunk in clips_BFCHW[:, 0].split(IMAGES_AT_ONCE)])

    def _pooled(self, images_BCHW: Tensor) -> Tensor:
        x = (self.resize(255 * images_BCHW) - 128) / 128
        for names in (self.stem, self.more):
            for name in names:
                x = self.get_submodule(name)(x)
            x = _halve(x)
        for name in self.mixed:
            x = self.get_submodule(name)(x)
        return x.mean((2, 3))


@one_for_all
def load_inception(weights: str | None, resize: str = "tensorflow") -> InceptionFeatures:
    """Inception from `weights`; UserError for an unknown `resize` or a file that is missing or another network's.

    resize: "tensorflow" (the first FID, torch-fidelity, the ADM suite), "pytorch_fid" or "torchmetrics" (smoothed).
    """
    if resize not in RESIZE:
        raise UserError(f"resize of Inception is {resize!r}. Use one of: {', '.join(RESIZE)}.")
    wanted_by = "FID with Inception features"
    tensors = read_weights(weights, FILE, wanted_by, OFFLINE, ORIGIN)
    network = InceptionFeatures(resize)
    fill(network, tensors, weights, wanted_by)
    return network
