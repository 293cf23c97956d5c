"""Outliers invited into a tiny denoiser: gains of its modulation that stay as they are while all weights train.

Large diffusion transformers have a few channels whose scale (1 + scale of adaLN) is many times that of the others, some
of them at certain noise levels only. Small ones trained on little data have none, and a training that is free to
choose makes them flat again. So they are fixed here before the first step, and the weights that read these channels
start as Gaussian as the others and find their own size. A training would still go round them, by leaving those
channels of the residual stream nearly empty (a fortieth of their variance after 2,200 steps), so the loss holds them at
a least size before the gain. For testing methods: no evidence about any large model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

MOVING, STATIC = 16, 3  # channels of a site, of 192: the same in all blocks; of each block its own
SMALLEST, LARGEST, SPREAD = 5.0, 45.0, 0.3
REST = -0.8  # what is added to 1 + scale of a moving channel, so that little of it stays
LEVELS, RIDGE = 101, 1e-4
LEAST_RMS = 0.5  # of a channel with a gain, over the tokens of a sample, where LayerNorm has left 1 on average
WEIGHT = 0.3  # of what is missing of that, in the loss


@dataclass(frozen=True)
class Gains:
    """What a channel's scale is multiplied by.

    moving, static: medians over the channels.
    ratio: by which a moving channel's gain changes from one end of the sampler's steps to the other.
    flow_shift: the sampler's, evenly over whose steps it changes; 1: evenly over the noise levels.
    """

    moving: float
    static: float
    ratio: float
    flow_shift: float = 1.0


GAINS = Gains(moving=22, static=11, ratio=8)
# What GAINS end at is a little harder than large models are said to be (incoherence 45.6; 40 is published for one).
MILD_GAINS = Gains(moving=16, static=8, ratio=8)
# A sampler of flow_shift 4 stays among the noisy levels, over which those gains move a channel's range 2.1 times.
STEEP_GAINS = Gains(moving=27, static=10, ratio=24, flow_shift=4)


@dataclass(frozen=True)
class Site:
    """Rows of adaLN (shift, scale, gate of attention, then of the mlp) whose channels get gains."""

    row: int
    moving: Tensor
    static: list[Tensor]


def sites(width: int, blocks: int, seed: int) -> list[Site]:
    """The channels of scale_msa (q, k, v read them) and scale_mlp (the first Linear of the mlp reads them)."""
    generator = torch.Generator().manual_seed(seed + 17)
    found = []
    for row in (1, 4):
        order = torch.randperm(width, generator=generator)
        found.append(Site(row, order[:MOVING], list(order[MOVING : MOVING + STATIC * blocks].split(STATIC))))
    return found


def _draw(count: int, median: float, generator: torch.Generator) -> Tensor:
    return (median * (SPREAD * torch.randn(count, generator=generator)).exp()).clamp(SMALLEST, LARGEST)


@torch.no_grad()
def invite_outliers(net: Any, seed: int, gains: Gains = GAINS) -> dict[str, Tensor]:
    """Set the gains of a PixArt or Latte denoiser whose timestep embedder is trained; the rest is as it was.

    Moving channels: rows of adaln_single.linear fitted so that the gain is G times ratio^(u - 1), or ratio^-u, at the
    place u of the sampler's way from clean to noise. Static ones: entries of each block's scale_shift_table. Returns,
    by name of a parameter, 1 where it may be trained and 0 where the gains live; the timestep embedder, which the fit
    leans on, is all 0.
    """
    generator = torch.Generator().manual_seed(seed + 18)
    blocks = _blocks(net)
    adaln = net.adaln_single
    width = adaln.linear.in_features
    masks = {name: torch.ones_like(p) for name, p in net.named_parameters() if _holds_gains(name)}
    for site in sites(width, len(blocks), seed):
        rows = site.row * width + site.moving
        weight_MC, bias_M = fit(adaln.emb, _draw(MOVING, gains.moving, generator), gains)
        adaln.linear.weight[rows], adaln.linear.bias[rows] = weight_MC, bias_M
        masks["adaln_single.linear.weight"][rows] = masks["adaln_single.linear.bias"][rows] = 0
        for name, block in net.named_modules():
            if block in blocks:
                own = site.static[blocks.index(block)]
                block.scale_shift_table[site.row, own] = _draw(STATIC, gains.static, generator) - 1
                block.scale_shift_table[site.row, site.moving] = REST
                masks[f"{name}.scale_shift_table"][site.row, torch.cat([own, site.moving])] = 0
    for name in masks:
        if name.startswith("adaln_single.emb."):
            masks[name].zero_()
    return masks


def _blocks(net: Any) -> list[Any]:
    return [m for name, m in net.named_modules() if name.rpartition(".")[0].endswith("transformer_blocks")]


class OutlierLoss:
    """A denoiser's loss, and WEIGHT times how far its channels with gains fall below LEAST_RMS, squared, on average.

    Each noise level counts by itself, so that the channels move with it as their gains do.
    """

    def __init__(self, net: Any, seed: int, loss: Callable[[Any, dict[str, Any]], Tensor]) -> None:
        self.loss = loss
        self._missing: list[Tensor] = []
        blocks = _blocks(net)
        self._hooks = []
        for site in sites(net.adaln_single.linear.in_features, len(blocks), seed):
            for block, static in zip(blocks, site.static, strict=True):
                norm = block.norm1 if site.row == 1 else block.norm2
                channels = torch.cat([site.moving, static])
                self._hooks.append(norm.register_forward_hook(partial(self._look, channels)))

    def _look(self, channels: Tensor, norm: nn.Module, args: Any, x_BLC: Tensor) -> None:
        rms_BK = x_BLC[..., channels].float().square().mean(1).add(1e-6).sqrt()
        self._missing.append((LEAST_RMS - rms_BK).clamp(min=0).square().mean())

    def __call__(self, net: Any, batch: dict[str, Any]) -> Tensor:
        """The loss of one batch."""
        self._missing.clear()
        return self.loss(net, batch) + WEIGHT * torch.stack(self._missing).mean() / LEAST_RMS**2

    def remove(self) -> None:
        """Let go of the denoiser."""
        for hook in self._hooks:
            hook.remove()


def _holds_gains(name: str) -> bool:
    return name.startswith("adaln_single.") or (name.endswith("scale_shift_table") and "blocks" in name)


def fit(embedder: nn.Module, gain_M: Tensor, gains: Gains) -> tuple[Tensor, Tensor]:
    """Ridge regression of the wanted gains on what adaln_single.linear reads, over all noise levels.

    Returns weights [M, C] and biases [M]; every other channel grows with the noise, the rest fall.
    """
    level_L = torch.linspace(0, 1, LEVELS)
    conditions = {"resolution": None, "aspect_ratio": None, "batch_size": LEVELS, "hidden_dtype": torch.float32}
    read_LC = nn.functional.silu(embedder(1000 * level_L, **conditions)).double()
    read_LC = torch.cat([read_LC, torch.ones(LEVELS, 1).double()], 1)
    grows_M = torch.arange(len(gain_M)) % 2 == 0
    place_L1 = (level_L / (gains.flow_shift - (gains.flow_shift - 1) * level_L))[:, None]
    wanted_LM = torch.where(grows_M, gains.ratio ** (place_L1 - 1), gains.ratio**-place_L1) * gain_M
    gram_CC = read_LC.T @ read_LC + RIDGE * torch.eye(read_LC.shape[1]).double()
    solved_CM = torch.linalg.solve(gram_CC, read_LC.T @ wanted_LM.double()).float()
    return solved_CM[:-1].T.contiguous(), solved_CM[-1]
