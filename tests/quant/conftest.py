"""A denoiser small enough to reason about, and golden data."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from viditq.quant import CalibrationStats, Calibrator, linear_names

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


class TinyDenoiser(nn.Module):
    """Two residual blocks; `position` is a non-persistent buffer, as diffusers' PixArt has one."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.proj_in = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"fc1": nn.Linear(16, 24), "norm": nn.LayerNorm(24), "fc2": nn.Linear(24, 16, bias=False)})
            for _ in range(2)
        )
        self.time = nn.Linear(1, 16)
        self.register_buffer("position", torch.linspace(-1, 1, 5)[:, None].expand(5, 16).clone(), persistent=False)
        self.to(dtype)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        level = timestep.to(hidden_states.dtype).reshape(-1, 1)[: len(hidden_states)] / 1000
        x = self.proj_in(hidden_states) + self.position + self.time(level)[:, None]
        for block in self.blocks:
            x = x + block["fc2"](torch.nn.functional.gelu(block["norm"](block["fc1"](x * (1 + 2 * level[:, None])))))
        return x


def calibrate(
    denoiser: nn.Module, seeds: list[int], timesteps: list[int], names: list[str] | None = None
) -> CalibrationStats:
    """Statistics of a run over prompts whose noise depends on their seed alone."""
    names = names or linear_names(denoiser)
    with Calibrator(denoiser, names, moment_layers=names) as calibrator, torch.no_grad():
        calibrator.set_sample_seeds(seeds)
        for timestep in timesteps:
            x = torch.stack([noise(seed, timestep) for seed in seeds]).to(next(denoiser.parameters()).dtype)
            denoiser(x, torch.full((len(seeds),), timestep))
    return calibrator.stats


def noise(seed: int, timestep: int) -> Tensor:
    """[5, 8], with one loud channel."""
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed * 1001 + timestep))
    x[:, 3] *= 20
    return x


@pytest.fixture
def denoiser() -> TinyDenoiser:
    torch.manual_seed(0)
    return TinyDenoiser()


@pytest.fixture
def make_denoiser() -> type[TinyDenoiser]:
    return TinyDenoiser


@pytest.fixture
def calibrated() -> Callable[..., CalibrationStats]:
    return calibrate


@pytest.fixture(scope="session")
def golden_quantizer() -> dict[str, Tensor]:
    return load_file(GOLDEN / "quantizer.safetensors")


@pytest.fixture(scope="session")
def golden_smooth() -> dict[str, Tensor]:
    return load_file(GOLDEN / "smooth.safetensors")
