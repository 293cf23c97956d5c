"""Each method of conf/experiment, at W4A4, against its formulas written out again for one Linear.

Legend: S samples, N tokens, C inputs, G inputs of a group.
"""

from collections.abc import Callable

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from viditq.quant import Calibrator, QuantLinear, quantize_denoiser
from viditq.quant.calibration.statistics import CalibrationStats
from viditq.quant.numerics.hadamard import rotate

S, N, C, G = 4, 6, 128, 64
NUM_OUT = 24
LEVELS = [100, 500, 900]


class OneLinear(nn.Module):
    """A denoiser that is one Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(C, NUM_OUT)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        out: Tensor = self.fc(hidden_states)
        return out


def inputs(level: int) -> Tensor:
    """[S, N, C]; some channels are loud."""
    generator = torch.Generator().manual_seed(level)
    return torch.randn(S, N, C, generator=generator) * torch.linspace(0.3, 6, C) * (1 + level / 1000)


@pytest.fixture
def denoiser() -> OneLinear:
    torch.manual_seed(0)
    return OneLinear()


@pytest.fixture
def stats(denoiser: OneLinear) -> CalibrationStats:
    with Calibrator(denoiser, ["fc"], moment_layers=["fc"]) as calibrator, torch.no_grad():
        calibrator.set_sample_seeds(range(S))
        for level in LEVELS:
            denoiser(inputs(level), torch.tensor(level))
    return calibrator.stats


@pytest.fixture
def quantized(
    denoiser: OneLinear, stats: CalibrationStats, configure: Callable[..., DictConfig]
) -> Callable[..., tuple[Tensor, Tensor, QuantLinear, Tensor]]:
    """Name of a method -> the float weight and bias, the quantized Linear, its output for the inputs at 500."""

    def make(name: str, *overrides: str) -> tuple[Tensor, Tensor, QuantLinear, Tensor]:
        setting = instantiate(configure(f"experiment={name}", "bits=w4a4", *overrides).quant, _convert_="all")
        weight, bias = denoiser.fc.weight.detach().clone(), denoiser.fc.bias.detach().clone()
        quantize_denoiser(denoiser, setting.plan(["fc"], []), stats)
        with torch.no_grad():
            out = denoiser(inputs(500), torch.tensor(500))
        assert isinstance(denoiser.fc, QuantLinear)
        return weight, bias, denoiser.fc, out

    return make


def grid(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """Scale and zero point of 4-bit asymmetric min-max along `axis`, or of everything."""
    lo, hi = (x.amin(), x.amax()) if axis is None else (x.amin(axis, True), x.amax(axis, True))
    scale = (hi.clamp(min=0) - lo.clamp(max=0)) / 15
    return scale, (-lo.clamp(max=0) / scale).round()


def fake(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (((x / scale).round() + zero).clamp(0, 15) - zero) * scale


def rows(x: Tensor) -> Tensor:
    """One scale per last axis: a token, or an output channel."""
    return fake(x, *grid(x, -1))


def groups(x: Tensor) -> Tensor:
    """One scale per 64 inputs."""
    return rows(x.unflatten(-1, (-1, G))).flatten(-2)


def close(out: Tensor, wanted: Tensor) -> None:
    """Equal but for a few values on the edge between two codes."""
    assert float((out - wanted).norm() / wanted.norm()) < 2e-3


def test_naive(quantized) -> None:
    weight, bias, _, out = quantized("naive")
    everything = torch.stack([inputs(level) for level in LEVELS])
    close(out, fake(inputs(500), *grid(everything, None)) @ rows(weight).T + bias)


def test_smoothquant(quantized) -> None:
    weight, bias, _, out = quantized("smoothquant")
    amax = torch.stack([inputs(level) for level in LEVELS]).flatten(0, 2).abs().amax(0)
    s = amax.sqrt() / weight.abs().amax(0).sqrt()
    close(out, rows(inputs(500) / s) @ rows(weight * s).T + bias)


def test_quarot(quantized) -> None:
    weight, bias, linear, out = quantized("quarot")
    matrix = rotate(torch.eye(C), linear.variants[0].chain[0].signs)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(C), atol=1e-5, rtol=0)
    torch.testing.assert_close(matrix.abs(), torch.full((C, C), C**-0.5), atol=1e-6, rtol=0)
    close(out, rows(inputs(500) @ matrix) @ rows(weight @ matrix).T + bias)


def test_convrot(quantized) -> None:
    """Rotated in groups of 64 by the regular matrix; symmetric: codes of -7 to 7 around a zero of 0."""
    weight, bias, _, out = quantized("convrot")
    order_4 = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    group = torch.kron(order_4, torch.kron(order_4, order_4))
    matrix = torch.block_diag(group, group)

    def symmetric(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / 7
        return (x / scale).round() * scale

    close(out, symmetric(inputs(500) @ matrix) @ symmetric(weight @ matrix).T + bias)


def test_viditq(quantized) -> None:
    weight, bias, linear, out = quantized("viditq")
    amax = torch.stack([inputs(level) for level in LEVELS]).flatten(0, 2).abs().amax(0)
    s = amax**0.3 / weight.abs().amax(0) ** 0.7
    matrix = rotate(torch.eye(C), linear.variants[0].chain[1].signs)
    close(out, rows((inputs(500) / s) @ matrix) @ rows((weight * s) @ matrix).T + bias)


def shrunk(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """The best of 80 ranges for the one set `x`, tried one by one."""
    candidates = [grid(x * (1 - i / 100), None) for i in range(80)]
    return min(candidates, key=lambda g: float((fake(x.double(), *g) - x).abs().pow(p).sum()))


@pytest.mark.parametrize(("name", "p"), [("q_diffusion", 2.4), ("ptq4dm", 2.0), ("ptq4dit", 2.4)])
def test_reconstructing_methods(quantized, stats: CalibrationStats, name: str, p: float) -> None:
    """Grids by L_p search, activations' on kept rows and extremes; weights down or up; less error than nearest."""
    weight, bias, linear, out = quantized(name)
    variant = linear.variants[0]
    weight, x = variant.chain.weight(weight), variant.chain.activation(inputs(500))
    assert (len(variant.chain) == 1) == (name == "ptq4dit")
    codes = variant.dequantized_weight()
    nearest = torch.empty_like(weight)
    for row in range(NUM_OUT):
        scale, zero = shrunk(weight[row], p)
        nearest[row] = fake(weight[row], scale, zero)
        clipped = weight[row].clamp(-zero * scale, (15 - zero) * scale)
        assert ((codes[row] - clipped).abs() < scale * 1.001).all()
    seen = variant.chain.activation(torch.stack([inputs(level) for level in LEVELS])).flatten(0, 2)
    error, before = (float(((weight - w) @ seen.T).square().sum()) for w in (codes, nearest))
    assert error < 0.95 * before
    segment = stats.segment("fc", 0.0, 1.0)
    rows = variant.scheme.activation_ranges.rows_of(segment)
    kept = torch.cat([rows, segment.minimum[None], segment.maximum[None]])
    scale, zero = shrunk(variant.chain.activation(kept).flatten(), p)
    close(out, fake(x, scale, zero) @ codes.T + bias)


def test_q_dit(quantized, stats: CalibrationStats) -> None:
    """Groups of 64 on both sides; GPTQ as the plain loop over columns, largest second moment first."""
    weight, bias, _linear, out = quantized("q_dit", "quant.rounding.descending=false")
    moments = stats.moments.of("fc").double()
    moments += torch.eye(C) * moments.diagonal().mean() * 0.01
    left, done = weight.double().clone(), torch.empty(NUM_OUT, C, dtype=torch.float64)
    scale, zero = grid(weight.double().unflatten(-1, (-1, G)), -1)
    inverse = torch.linalg.inv(moments)
    for column in range(C):
        done[:, column] = fake(left[:, column], scale[:, column // G, 0], zero[:, column // G, 0])
        lost = (left[:, column] - done[:, column]) / inverse[0, 0]
        left[:, column:] -= lost[:, None] * inverse[0]
        inverse = (inverse - inverse[:, :1] @ inverse[:1] / inverse[0, 0])[1:, 1:]
    close(out, groups(inputs(500)) @ done.float().T + bias)


def test_svdquant(quantized) -> None:
    """Smoothed; a branch of the rank takes the large part in float, groups of 64 the rest."""
    weight, bias, linear, out = quantized("svdquant", "quant.low_rank=4")
    amax = torch.stack([inputs(level) for level in LEVELS]).flatten(0, 2).abs().amax(0)
    s = amax.sqrt() / weight.abs().amax(0).sqrt()
    variant = linear.variants[0]
    up, down = variant.low_rank_up.float(), variant.low_rank_down.float()
    assert up.shape == (NUM_OUT, 4) and down.shape == (4, C)
    rest = groups(weight * s - up @ down)
    x = inputs(500) / s
    close(out, x @ (up @ down).T + groups(x) @ rest.T + bias)
    u, d, v = torch.linalg.svd(weight * s, full_matrices=False)
    plain = u[:, :4] * d[:4] @ v[:4]
    before = (weight * s - plain - groups(weight * s - plain)).norm()
    assert (weight * s - up @ down - rest).norm() <= before * 1.001
