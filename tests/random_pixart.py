"""A small random PixArt, and what its statistics say."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from viditq.quant import (
    CalibrationStats,
    Calibrator,
    linear_names,
)

CONFIG = {
    **{"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "in_channels": 4, "out_channels": 4},
    **{"cross_attention_dim": 32, "caption_channels": 32, "sample_size": 8, "norm_type": "ada_norm_single"},
    **{"norm_elementwise_affine": False, "use_additional_conditions": False},
}
STEPS = (980, 640, 300, 10)


def random_model(dtype: torch.dtype = torch.float32) -> PixArtTransformer2DModel:
    torch.manual_seed(0)
    return PixArtTransformer2DModel(**CONFIG).to(dtype).eval()


def called(model: Any, timestep: int, seed: int = 1) -> Tensor:
    noise = torch.Generator().manual_seed(seed)
    dtype = model.dtype
    with torch.no_grad():
        return model(
            torch.randn(2, 4, 8, 8, generator=noise).to(dtype),
            encoder_hidden_states=torch.randn(2, 5, 32, generator=noise).to(dtype),
            timestep=torch.full((2,), timestep),
            return_dict=False,
        )[0]


def outputs(model: Any) -> Tensor:
    """At a step of each range of noise levels."""
    return torch.stack([called(model, timestep) for timestep in STEPS])


def statistics(model: nn.Module) -> CalibrationStats:
    names = linear_names(model)
    with Calibrator(model, names, moment_layers=names) as calibrator:
        calibrator.set_sample_seeds([1, 2])
        for timestep in STEPS:
            called(model, timestep)
    return calibrator.stats
