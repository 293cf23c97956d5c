"""Sine-cosine tables of STDiT: where a patch lies in its frame, and which frame it is.

Legend: T frames, S patches of a frame, C channels.
"""

import math

import torch
from torch import Tensor

MAX_PERIOD = 10_000.0


def frequencies(num: int) -> Tensor:
    """Angular frequencies MAX_PERIOD^(-i / num), float64 [num]."""
    return MAX_PERIOD ** (-torch.arange(num, dtype=torch.float64) / num)


def sine_cosine(positions: Tensor, channels: int) -> Tensor:
    """Positions [N] -> float64 [N, channels]: the sines of all frequencies, then their cosines."""
    angles = positions.double()[:, None] * frequencies(channels // 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def spatial_table(rows: int, columns: int, channels: int, scale: float) -> Tensor:
    """float32 [1, S, C] over patches row by row: half of the channels from the column, then half from the row.

    scale: positions are divided by it, so that models trained at one size keep their distances at another.
    """
    column_S = torch.arange(columns).repeat(rows) / scale
    row_S = torch.arange(rows).repeat_interleave(columns) / scale
    halves = [sine_cosine(position, channels // 2) for position in (column_S, row_S)]
    return torch.cat(halves, dim=1).float()[None]


def temporal_table(frames: int, channels: int, scale: float) -> Tensor:
    """float32 [1, T, C] over frames."""
    return sine_cosine(torch.arange(frames) / scale, channels).float()[None]


def timestep_features(timestep: Tensor, channels: int) -> Tensor:
    """Timesteps [B] -> float32 [B, channels]: the cosines of all frequencies, then their sines.

    The frequencies are rounded as the original rounds them, step by step in float32: at t = 950 that moves an angle by
    5e-5.
    """
    half = channels // 2
    order = torch.arange(half, dtype=torch.float32, device=timestep.device)
    angles = timestep.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * order / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)
