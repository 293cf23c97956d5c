"""Our attention on a CPU against torch's and float64.

Legend: B batch, L queries, K keys, H heads, G heads of keys, D channels of a head.
"""

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    LatteTransformer3DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from torch.nn import functional

from viditq.errors import UserError
from viditq.models import attention as backends
from viditq.models.native import op, processors
from viditq.models.stdit import STDiT

needs_kernel = pytest.mark.skipif(op.missing() is not None, reason=f"needs {op.missing()}")
SHAPES_BLKHD = [(2, 100, 100, 3, 72), (1, 16, 16, 5, 64), (1, 33, 1, 2, 32), (3, 1, 77, 1, 40), (1, 48, 257, 2, 128)]
SHAPES_BLKHD += [(1, 96, 64, 2, 96), (2, 15, 120, 4, 88), (1, 300, 130, 1, 56)]


def inputs(B: int, L: int, K: int, H: int, D: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """q, k, v; the keys have channels far off zero, as a DiT's have."""
    rng = torch.Generator().manual_seed(L * K + D)
    q, k, v = (torch.randn(B, n, H, D, generator=rng) for n in (L, K, K))
    return tuple(x.to(dtype) for x in (q, k + 4 * torch.randn(D, generator=rng), v))


def torchs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """torch's own attention of [B, L, H, D], with a mask in q's dtype where it is added."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
    return functional.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)


def error(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> float:
    """Relative L2 distance from torch's attention in float64."""
    exact = torchs(q.double(), k.double(), v.double(), mask, scale)
    return ((out.double() - exact).norm() / exact.norm()).item()


@pytest.fixture(scope="module", autouse=True)
def kernel() -> None:
    if op.missing() is None:
        op.load()


@needs_kernel
def test_float32_of_bfloat16_is_what_float32_gives() -> None:
    """So that q, k and v may be written in half the bytes where nothing else reads them."""
    for shape in SHAPES_BLKHD:
        half = inputs(*shape)
        out = op.attention(*half, out_dtype=torch.float32)
        assert out.dtype == torch.float32 and torch.equal(out, op.attention(*(x.float() for x in half)))
    with pytest.raises(RuntimeError, match="viditq::attention: Half of BFloat16"):
        op.attention(*half, out_dtype=torch.float16)


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES_BLKHD, ids=str)
def test_is_as_exact_as_torchs_in_bf16(shape: tuple[int, ...]) -> None:
    q, k, v = inputs(*shape)
    out = op.attention(q, k, v)
    assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
    assert error(out, q, k, v) <= 1.2 * error(torchs(q, k, v), q, k, v)
    avx512 = torch.ops.viditq.attention(q, k, v, None, shape[-1] ** -0.5, False)
    assert error(avx512, q, k, v) <= 1.2 * error(torchs(q, k, v), q, k, v)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_are_rounded_to_bf16_for_the_products_alone(dtype: torch.dtype) -> None:
    for shape in SHAPES_BLKHD:
        q, k, v = inputs(*shape, dtype)
        out = op.attention(q, k, v)
        assert out.dtype == dtype
        rounded = [x.bfloat16() for x in (q, k, v)]
        assert error(out, *rounded) <= 1.2 * error(torchs(*rounded), *rounded), shape


@needs_kernel
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(50, 70), (1, 70), (2, 1, 1, 70), (1, 3, 50, 70), (2, 3, 50, 70), (2, 1, 50, 1)], ids=str
)
def test_masks(shape: tuple[int, ...], kind: torch.dtype) -> None:
    q, k, v = inputs(2, 50, 70, 3, 72)
    rng = torch.Generator().manual_seed(0)
    mask = torch.rand(shape, generator=rng) > 0.3 if kind == torch.bool else torch.randn(shape, generator=rng).to(kind)
    if kind == torch.bool:
        mask[..., 0] = True
    assert error(op.attention(q, k, v, mask), q, k, v, mask) <= 1.2 * error(torchs(q, k, v, mask), q, k, v, mask)


@needs_kernel
@pytest.mark.parametrize("keys", [5, 64, 200])
def test_a_query_without_keys_is_zero_as_torchs(keys: int) -> None:
    q, k, v = inputs(1, 20, keys, 2, 64)
    mask = torch.ones(1, 1, 20, keys, dtype=torch.bool)
    mask[:, :, 3] = mask[:, :, 17] = False
    mask[:, :, 5, :-1] = False  # whole blocks are masked before the first key
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    for given in (mask, added):
        out = op.attention(q, k, v, given)
        assert (out[0, [3, 17]] == 0).all() and (torchs(q, k, v, given)[0, [3, 17]] == 0).all()
        assert torch.equal(out[0, 5], v[0, -1])
        assert error(out, q, k, v, given) < 4e-3
    far = op.attention(q, k, v, torch.full((1, 1, 1, keys), -10000.0))  # diffusers' way to mask: all keys alike here
    assert error(far, q, k, v) < 4e-3


@needs_kernel
@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("channels", [8, 120, 128, 136, 256])
def test_any_width_of_a_head(channels: int, amx: bool) -> None:
    q, k, v = inputs(1, 40, 70, 2, channels)
    out = torch.ops.viditq.attention(q, k, v, None, channels**-0.5, amx)
    assert error(out, q, k, v) <= 1.2 * error(torchs(q, k, v), q, k, v)


@needs_kernel
@pytest.mark.parametrize("amx", [True, False])
def test_scores_that_grow_from_key_to_key(amx: bool) -> None:
    """The greatest of the first keys is far too small for the last ones; sums are brought to a new one on the way."""
    q, k, v = inputs(1, 40, 300, 2, 64)
    for growth in (0.02, 0.3, 20.0):
        grown = (k.float() * torch.linspace(0.1, growth, 300)[None, :, None, None]).bfloat16()
        out = torch.ops.viditq.attention(q, grown, v, None, 0.125, amx)
        assert error(out, q, grown, v) <= 1.2 * error(torchs(q, grown, v), q, grown, v), growth
    masked = torch.zeros(1, 1, 40, 300)
    masked[..., :150] = -torch.inf  # nothing at all in the first blocks
    out = torch.ops.viditq.attention(q, k, v, masked, 0.125, amx)
    assert error(out, q, k, v, masked) <= 1.2 * error(torchs(q, k, v, masked), q, k, v, masked)


@needs_kernel
def test_views_and_shared_heads() -> None:
    qkv = torch.randn(2, 60, 3, 4, 72, generator=torch.Generator().manual_seed(0)).bfloat16()
    q, k, v = qkv.unbind(2)
    assert torch.equal(op.attention(q, k, v), op.attention(*(x.contiguous() for x in (q, k, v))))
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]  # channels are not the last in memory
    assert torch.equal(op.attention(*turned), op.attention(q, k, v))
    few = [x[:, :, ::2] for x in (k, v)]
    repeated = [x.repeat_interleave(2, dim=2) for x in few]
    assert torch.equal(op.attention(q, *few), op.attention(q, *repeated))


@needs_kernel
@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0, 1e-3])
def test_scales(scale: float) -> None:
    q, k, v = inputs(1, 40, 90, 2, 64)
    assert error(op.attention(q, k, v, None, scale), q, k, v, None, scale) < 4e-3


@needs_kernel
def test_extreme_scores_and_what_is_not_finite() -> None:
    q, k, v = inputs(1, 40, 90, 2, 64, torch.float32)
    huge = op.attention(1000 * q, 1000 * k, v)
    assert torch.isfinite(huge).all()
    q[0, 7, 0, 3] = torch.nan
    out = op.attention(q, k, v)
    assert out[0, 7, 0].isnan().all() and torch.isfinite(out[0, 8]).all() and torch.isfinite(out[0, 7, 1]).all()


@needs_kernel
@pytest.mark.parametrize("shape", [(1, 700, 90, 1, 64), (2, 100, 100, 3, 72)], ids=str)
def test_threads_do_not_change_a_bit(shape: tuple[int, ...]) -> None:
    q, k, v = inputs(*shape)
    mask = torch.rand(shape[1], shape[2], generator=torch.Generator().manual_seed(0)) > 0.5
    before, outputs = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outputs.append(op.attention(q, k, v, mask))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outputs)


@needs_kernel
def test_empty_tensors() -> None:
    assert op.attention(*inputs(0, 5, 5, 2, 64)).shape == (0, 5, 2, 64)
    assert op.attention(*inputs(2, 0, 5, 2, 64)).shape == (2, 0, 2, 64)
    assert (op.attention(*inputs(2, 5, 0, 2, 64)) == 0).all()


@needs_kernel
def test_is_an_op_that_compiles_whole() -> None:
    q, k, v = inputs(1, 20, 30, 2, 64)
    mask = torch.ones(1, 1, 20, 30, dtype=torch.bool)
    torch.library.opcheck(
        torch.ops.viditq.attention.default, (q, k, v, mask, 0.1), test_utils=["test_schema", "test_faketensor"]
    )
    compiled = torch.compile(lambda *x: op.attention(*x) + 1, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(q, k, v), op.attention(q, k, v) + 1)


@needs_kernel
def test_gradients_are_torchs() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(1, 20, 30, 2, 64, torch.float32))
    ours = torch.autograd.grad(op.attention(q, k, v).square().sum(), (q, k, v))
    wanted = torch.autograd.grad(torchs(q, k, v).square().sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: x[..., :24],
            r"heads of 32 to 128 channels, a multiple of 8; an attention layer has heads of 24\. Leave",
        ),
        (lambda x: x[..., :36], "heads of 36"),
        (lambda x: torch.cat([x, x, x], -1), "heads of 192"),
        (lambda x: x.double(), r"in bfloat16, float16 or float32, not on cpu in float64\. Leave"),
    ],
)
def test_what_the_kernel_does_not_take(change: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        op.attention(*(change(x) for x in inputs(1, 4, 4, 1, 64)))


# Denoisers ------------------------------------------------------------------------------------------------------------


def pixart() -> tuple[nn.Module, dict[str, Any]]:
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=40, num_layers=2, cross_attention_dim=80, caption_channels=16,
        sample_size=8, use_additional_conditions=False,
    )  # fmt: skip
    mask = torch.tensor([[1.0] * 3 + [0.0] * 4, [1.0] * 7])
    given = {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 7, 16)}
    return model, given | {"timestep": torch.tensor([3, 3]), "encoder_attention_mask": mask}


def latte() -> tuple[nn.Module, dict[str, Any]]:
    model = LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, num_layers=1, cross_attention_dim=64, caption_channels=16,
        sample_size=8, patch_size=2, norm_type="ada_norm_single", norm_elementwise_affine=False, video_length=3,
        in_channels=4, out_channels=4, attention_bias=True,
    )  # fmt: skip
    given = {"hidden_states": torch.randn(1, 4, 3, 8, 8), "encoder_hidden_states": torch.randn(1, 7, 16)}
    return model, given | {"timestep": torch.tensor([3])}


def flux() -> tuple[nn.Module, dict[str, Any]]:
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    given = {"hidden_states": torch.randn(1, 64, 16), "encoder_hidden_states": torch.randn(1, 10, 32)}
    given |= {"pooled_projections": torch.randn(1, 32), "timestep": torch.tensor([0.5])}
    return model, given | {"img_ids": torch.rand(64, 3), "txt_ids": torch.zeros(10, 3)}


def wan() -> tuple[nn.Module, dict[str, Any]]:
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=48, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=64, num_layers=1,
    )  # fmt: skip
    given = {"hidden_states": torch.randn(1, 4, 3, 8, 8), "encoder_hidden_states": torch.randn(1, 7, 16)}
    return model, given | {"timestep": torch.tensor([5.0])}


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=64, pooled_projection_dim=16,
        pos_embed_max_size=8,
    )  # fmt: skip
    given = {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 7, 16)}
    return model, given | {"timestep": torch.tensor([3, 3]), "pooled_projections": torch.randn(2, 16)}


def stdit() -> tuple[nn.Module, dict[str, Any]]:
    config = {"sample_size": 8, "num_frames": 2, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32}
    model = STDiT(**config, caption_channels=16, max_caption_tokens=7)
    mask = torch.tensor([[1] * 3 + [0] * 4, [1] * 7])
    given = {"hidden_states": torch.randn(2, 4, 2, 8, 8), "encoder_hidden_states": torch.randn(2, 7, 16)}
    return model, given | {"timestep": torch.tensor([3, 3]), "encoder_attention_mask": mask}


@pytest.fixture
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@needs_kernel
@pytest.mark.parametrize("build", [pixart, latte, flux, wan, sd3, stdit])
@torch.no_grad()
def test_denoisers(build: Callable[[], tuple[nn.Module, dict[str, Any]]], seeded: None) -> None:
    model, given = build()
    model.eval()
    other = copy.deepcopy(model)
    plain = model(**given).sample
    backends.check_dispatches("native", model)
    backends.set_attention("native", model)
    ours = model(**given).sample
    assert 0 < (ours - plain).norm() / plain.norm() < 5e-3
    assert torch.equal(other(**given).sample, plain)
    assert torch.equal(copy.deepcopy(model)(**given).sample, ours)


@needs_kernel
@pytest.mark.parametrize("build", [flux, pytest.param(pixart, marks=pytest.mark.slow)])  # slow: a second class
@torch.no_grad()
def test_denoisers_compile_whole(build: Callable[[], tuple[nn.Module, dict[str, Any]]], seeded: None) -> None:
    model, given = build()
    backends.set_attention("native", model.eval())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**given).sample, model(**given).sample, rtol=1e-4, atol=1e-5)


def test_heads_are_checked_before_anything_runs() -> None:
    model = PixArtTransformer2DModel(num_attention_heads=2, attention_head_dim=24, num_layers=1, sample_size=8)
    with pytest.raises(UserError, match=r"PixArtTransformer2DModel\.transformer_blocks\.0\.attn1 has heads of 24"):
        backends.check_dispatches("native", model)
    stdit = STDiT(num_layers=1, num_attention_heads=2, attention_head_dim=16, sample_size=8)
    with pytest.raises(UserError, match=r"STDiT\.blocks\.0\.attn has heads of 16"):
        backends.check_dispatches("native", stdit)
    with pytest.raises(UserError, match="Linear does not choose its attention by diffusers' dispatch or call torch"):
        backends.check_dispatches("native", nn.Linear(2, 2))


def test_machines_that_cannot_are_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"computes on a CPU, and this run on cuda\. Leave model\.attention=null"):
        backends.check_device("native", "cuda")
    backends.check_device(None, "cuda")
    for failing, reason in (("compiler", "there is no C++ compiler"), ("check_cpu", "this CPU has no avx512bf16")):
        with monkeypatch.context() as patch:
            for name in ("check_cpu", "compiler"):
                patch.setattr(op.kernels, name, refusing(reason) if name == failing else lambda *_: None)
            op.missing.cache_clear()
            with pytest.raises(UserError, match=rf"cannot run here: {re.escape(reason)}\. Leave model\.attention=null"):
                backends.check_attention("native", "float32")
    op.missing.cache_clear()


def refusing(reason: str) -> Callable[..., None]:
    def refuse(*_: Any) -> None:
        raise op.kernels.CannotBuild(reason)

    return refuse


@pytest.mark.parametrize(("given", "message"), [({"is_causal": True}, "causal"), ({"dropout_p": 0.1}, "dropout")])
def test_kinds_of_attention_that_it_is_not(given: dict[str, Any], message: str) -> None:
    q, k, v = inputs(1, 4, 4, 1, 64)
    for call in (processors._dispatched, processors._like_torch):
        with pytest.raises(UserError, match=message):
            call(q, k, v, **given)
