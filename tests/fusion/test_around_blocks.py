"""What fused blocks do beside products: patches, rows, rotary positions. To the bit what plain torch gives."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from viditq.fusion.block import TOLERANCE, disagreement
from viditq.fusion.install import fuse_blocks, unfuse_blocks
from viditq.fusion.norms import rms_norm
from viditq.fusion.patches import LARGE, FusedPatches2d, FusedPatches3d, cuts_patches, in_rows
from viditq.fusion.rotary import rotate_pairs
from viditq.models.stdit import STDiT
from viditq.quant import QuantSpec, Recipe, linear_names, quantize_denoiser
from viditq.quant.execution.backends.fake import FakeBackend

CONVOLUTIONS: list[tuple[Callable[[], nn.Module], type[nn.Module], tuple[int, ...]]] = [
    (lambda: nn.Conv2d(4, 24, 2, stride=2), FusedPatches2d, (2, 4, 8, 8)),
    (lambda: nn.Conv3d(4, 24, (1, 2, 2), stride=(1, 2, 2)), FusedPatches3d, (2, 4, 3, 8, 8)),
]


@pytest.mark.parametrize(("make", "fused", "size"), CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_patches_are_the_same_and_tokens_contiguous(
    make: Callable[[], nn.Module], fused: type[nn.Module], size: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    conv, x = make().to(dtype), torch.randn(size).to(dtype)
    plain = conv(x)
    assert cuts_patches(conv)
    conv.__class__ = fused
    out = conv(x)
    assert torch.equal(out, plain)
    assert dtype == torch.float32 or out.flatten(2).transpose(1, 2).is_contiguous()


def test_only_patches_that_do_not_overlap_are_fused() -> None:
    assert not cuts_patches(nn.Conv2d(4, 8, 3, padding=1))
    assert not cuts_patches(nn.Linear(4, 8))


def test_a_fused_denoiser_makes_patches_so_and_an_unfused_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeBackend, "fuses", True)
    model = STDiT(
        sample_size=4, num_frames=3, num_layers=1, num_attention_heads=2, attention_head_dim=32, caption_channels=16
    )
    names = [name for name in linear_names(model) if name.startswith("blocks.")]
    plan = Recipe(QuantSpec(8, granularity="channel"), QuantSpec(8, granularity="token", dynamic=True)).resolve(names)
    quantize_denoiser(model.eval(), plan, None, "fake", 1000.0)
    fuse_blocks(model)
    assert type(model.x_embedder.proj) is FusedPatches3d
    unfuse_blocks(model)
    assert type(model.x_embedder.proj) is nn.Conv3d


@pytest.mark.parametrize("tokens", [4, LARGE // 32])  # on both sides of what is copied sample by sample
def test_rows(tokens: int) -> None:
    x_BNC = torch.randn(2, 32, tokens).transpose(1, 2)
    out = in_rows(x_BNC)
    assert out.is_contiguous() and torch.equal(out, x_BNC)
    assert in_rows(out) is out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_positions_are_those_of_real_numbers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, angles = torch.randn(2, 7, 3, 16).to(dtype), 10 * torch.randn(7, 1, 8)
    cos, sin = (f(angles).repeat_interleave(2, -1) for f in (torch.cos, torch.sin))
    expected = torch.empty_like(x)
    even, odd = x[..., 0::2], x[..., 1::2]
    expected[..., 0::2] = even * cos[..., 0::2] - odd * sin[..., 0::2]
    expected[..., 1::2] = even * sin[..., 0::2] + odd * cos[..., 0::2]
    assert torch.equal(rotate_pairs(x, cos, sin), expected)
    assert _close(rotate_pairs(x, cos.double(), sin.double()), expected)  # not as complex numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_rms_norms_are_those_of_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, norm = (3 * torch.randn(2, 7, 96)).to(dtype), nn.RMSNorm(32, eps=1e-6).to(dtype)
    norm.weight.copy_(torch.rand(32))
    x = x[..., 32:64]  # as a part of what several Linears gave together
    kept = x.clone()
    assert torch.equal(rms_norm(norm, x), norm(x)) and torch.equal(x, kept)
    for other in (nn.RMSNorm(32).to(dtype), nn.RMSNorm(32, 1e-6, elementwise_affine=False), nn.Identity()):
        assert torch.equal(rms_norm(other, x), other(x))


def test_a_block_that_adds_little_is_held_to_what_its_type_can_tell() -> None:
    torch.manual_seed(0)
    x, added = torch.randn(64, 256), 0.01 * torch.randn(64, 256)
    x = x.bfloat16().float()
    plain, fused = (x + added).bfloat16(), (x + added * (1 + 0.01 * torch.randn(64, 256))).bfloat16()
    assert disagreement(fused, plain, [x.bfloat16()]) < TOLERANCE[torch.bfloat16]
    forgotten = (x + 0.7 * added).bfloat16()
    assert disagreement(forgotten, plain, [x.bfloat16()]) > TOLERANCE[torch.bfloat16]


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.float(), other.float(), rtol=1e-2, atol=1e-2)
