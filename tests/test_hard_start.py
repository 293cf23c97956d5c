"""The hard tiny models: where their gains lie before the first step, and that training leaves them there."""

import pytest
import torch
from diffusers import LatteTransformer3DModel, PixArtTransformer2DModel

from viditq.tiny import networks
from viditq.tiny.hard import (
    GAINS,
    LARGEST,
    LEAST_RMS,
    MOVING,
    STATIC,
    STEEP_GAINS,
    WEIGHT,
    OutlierLoss,
    invite_outliers,
    sites,
)
from viditq.tiny.trainee import Schedule, Trainee

Net = PixArtTransformer2DModel | LatteTransformer3DModel
NO_CONDITIONS = {"resolution": None, "aspect_ratio": None}


@pytest.fixture(params=["image", "video"])
def started(request: pytest.FixtureRequest) -> tuple[Net, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    net = networks.image_denoiser() if request.param == "image" else networks.video_denoiser()
    for linear in (net.adaln_single.emb.timestep_embedder.linear_1, net.adaln_single.emb.timestep_embedder.linear_2):
        torch.nn.init.normal_(linear.weight, std=0.2)  # a trained one tells the noise levels apart
    return net, invite_outliers(net, 0)


def gains(net: Net, row: int) -> list[torch.Tensor]:
    """1 + scale [levels, width] of every block."""
    level = 1000 * torch.linspace(0, 1, 21)
    with torch.no_grad():
        told = net.adaln_single(level, NO_CONDITIONS, batch_size=21, hidden_dtype=torch.float32)[0].unflatten(
            1, (6, -1)
        )
    tables = [p for name, p in net.named_parameters() if "blocks" in name and name.endswith("scale_shift_table")]
    return [(1 + table[row] + told[:, row]).detach() for table in tables]


def test_some_channels_stick_out_and_move_with_the_noise(started):
    net, _ = started
    blocks = 4 if isinstance(net, PixArtTransformer2DModel) else 8
    for site in sites(192, blocks, 0):
        found = gains(net, site.row)
        assert len(found) == blocks
        for gain, own in zip(found, site.static, strict=True):
            largest, smallest = gain.abs().amax(0), gain.abs().amin(0)
            others = torch.ones(192, dtype=torch.bool)
            others[torch.cat([own, site.moving])] = False
            assert (largest[others] == 1).all()
            assert (largest[own] >= 2).all() and torch.equal(largest[own], smallest[own])
            moved = largest[site.moving] / smallest[site.moving]
            assert (moved > 3).all() and (moved < 1.3 * GAINS.ratio).all()
            grows = gain[-1, site.moving] > gain[0, site.moving]
            assert grows.sum() == MOVING // 2 and largest.max() <= 1.05 * LARGEST + 0.2
        own = torch.cat(site.static)
        assert len({*own.tolist(), *site.moving.tolist()}) == STATIC * blocks + MOVING


def test_steep_gains_move_evenly_over_the_samplers_steps(started):
    """Of flow_shift 4: half of its way is noise level 0.8, where a gain has moved by the root of its ratio."""
    net, _ = started
    before = gains(net, 1)[0]
    invite_outliers(net, 0, STEEP_GAINS)
    gain, moving = gains(net, 1)[0], sites(192, 1, 0)[0].moving
    moved = (gain[-1] / gain[0])[moving]
    half = (gain[16] / gain[0])[moving]  # level 16 / 20 = 0.8
    assert (moved > 15)[::2].all() and (moved < 1 / 15)[1::2].all()
    torch.testing.assert_close(half.log() / moved.log(), torch.full((MOVING,), 0.5), rtol=0.15, atol=0)
    assert ((before[-1] / before[0])[moving].log().abs() < moved.log().abs()).all()


def test_training_moves_every_weight_but_the_gains(started):
    net, masks = started

    def loss(model, _):
        return sum((p.float() - 1).square().mean() for p in model.parameters())

    start = {name: p.detach().clone().bfloat16() for name, p in net.named_parameters()}
    trainee = Trainee(net, lambda _: {}, loss, Schedule(steps=5, lr=0.1, warmup=1), 0, masks)
    optimizer = trainee.configure_optimizers()["optimizer"]
    for _ in range(3):
        optimizer.zero_grad()
        loss(trainee.net, {}).backward()
        optimizer.step()
    for name, param in trainee.net.named_parameters():
        stays = masks[name] == 0 if name in masks else torch.zeros_like(param, dtype=torch.bool)
        moved = param != start[name]
        assert not moved[stays].any(), name
        assert moved[~stays & (start[name] != 1)].all(), name


def test_channels_with_gains_that_grow_too_small_cost_something(started):
    """LayerNorm leaves 1 on average; a channel that a sample's tokens hardly use counts, alone and squared."""
    net, _ = started
    blocks = 4 if isinstance(net, PixArtTransformer2DModel) else 8

    def hidden_states(model, _):
        for block in (m for m in model.modules() if hasattr(m, "scale_shift_table") and hasattr(m, "norm1")):
            for norm in (block.norm1, block.norm2):
                norm(x_BLC)
        return torch.zeros(())

    kept = OutlierLoss(net, 0, hidden_states)
    x_BLC = torch.randn(2, 64, 192, generator=torch.Generator().manual_seed(0))
    assert kept(net, {}) == 0
    first, second = sites(192, blocks, 0)
    elsewhere = torch.cat([second.moving, *second.static]).tolist()
    channel = next(c for c in first.moving.tolist() if c not in elsewhere)
    x_BLC[1, :, channel] = 0  # constant where the others vary: LayerNorm keeps it near 0
    rms = torch.nn.functional.layer_norm(x_BLC, [192])[1, :, channel].square().mean().sqrt()
    # One of two samples, of the channels of one site, and one of two sites in every block.
    expected = WEIGHT * (1 - rms / LEAST_RMS) ** 2 / (2 * (MOVING + STATIC) * 2)
    torch.testing.assert_close(kept(net, {}), expected, rtol=0.02, atol=0)
    kept.remove()
    assert not any(m._forward_hooks for m in net.modules())
