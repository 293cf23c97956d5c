"""A denoiser of two frames a sample, with blocks that are modules: attention over tokens and a feed-forward."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viditq.quant import BlockInputs, BlockStore
from viditq.quant.calibration.observers import NUM_BUCKETS
from viditq.quant.reconstruction.collect import finish

NUM_FRAMES, NUM_TOKENS, WIDTH = 2, 6, 32
BLOCKS = ["blocks.0", "blocks.1"]
LEVELS = (950, 600, 350, 50)


class Block(nn.Module):
    """hidden_states [B F, N, C] attend to their tokens; caption [B F, T, C] is added; time [B F, C] scales."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, mask: None, caption: Tensor, time: Tensor | None = None) -> Tensor:
        x = F.layer_norm(hidden_states, (WIDTH,)) * (1 + time[:, None]) + caption.mean(1, keepdim=True)
        query, value = self.to_q(x), self.to_v(x)
        x = hidden_states + torch.softmax(query @ x.mT / WIDTH**0.5, -1) @ value
        return x + self.fc2(F.gelu(self.fc1(F.layer_norm(x, (WIDTH,)))))


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj_in = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in BLOCKS)

    def forward(self, hidden_states: Tensor, timestep: Tensor, caption: Tensor) -> Tensor:
        x_LNC = self.proj_in(hidden_states.flatten(0, 1))
        time = torch.linspace(-1, 1, WIDTH) * timestep[:, None] / 1000
        caption, time = (t.repeat_interleave(NUM_FRAMES, 0) for t in (caption, time))
        for block in self.blocks:
            x_LNC = block(x_LNC, None, caption, time=time)
        return x_LNC


def sample(denoiser: nn.Module, seeds: Sequence[int], levels: Sequence[int] = LEVELS) -> None:
    """One batch through all steps, both branches stacked, as guidance does."""
    for level in levels:
        generators = [torch.Generator().manual_seed(seed * 1001 + level) for seed in seeds]
        x = torch.stack([torch.randn(NUM_FRAMES, NUM_TOKENS, 8, generator=g) for g in generators])
        x[..., 2] *= 8
        captions = torch.stack([torch.randn(3, WIDTH, generator=g) for g in generators])
        both = torch.cat([captions, torch.zeros_like(captions)])
        denoiser(torch.cat([x, x]), torch.full((2 * len(seeds),), level), both)


def collect(denoiser: nn.Module, folder: Path, batches: Sequence[Sequence[int]], budget: int = 2**21) -> BlockStore:
    """Inputs of both blocks over these batches of prompts."""
    inputs = BlockInputs(denoiser, BLOCKS, folder, budget)
    for seeds in batches:
        run_batch(denoiser, inputs, seeds)
    finish(inputs.store, budget, inputs.state(), NUM_BUCKETS)
    return inputs.store


def run_batch(denoiser: nn.Module, inputs: BlockInputs, seeds: Sequence[int], levels: Sequence[int] = LEVELS) -> None:
    """One batch with its inputs kept."""
    with inputs, torch.no_grad():
        inputs.set_sample_seeds(seeds)
        sample(denoiser, seeds, levels)
