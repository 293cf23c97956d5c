"""The toy denoiser, its statistics and the inputs of its blocks."""

from pathlib import Path

import pytest
import torch
from toy_blocks import Denoiser, collect, sample

from viditq.quant import BlockStore, CalibrationStats, Calibrator, linear_names


@pytest.fixture
def denoiser() -> Denoiser:
    torch.manual_seed(0)
    return Denoiser().eval().requires_grad_(False)


@pytest.fixture
def stats(denoiser: Denoiser) -> CalibrationStats:
    """Of 24 prompts, with second moments."""
    names = linear_names(denoiser)
    with Calibrator(denoiser, names, moment_layers=names) as calibrator, torch.no_grad():
        calibrator.set_sample_seeds(range(24))
        sample(denoiser, range(24))
    return calibrator.stats


@pytest.fixture
def store(denoiser: Denoiser, tmp_path: Path) -> BlockStore:
    """All inputs of 24 prompts."""
    return collect(denoiser, tmp_path / "store", [range(24)])
