"""The low-rank branch against torch's SVD, and what it is worth in a QuantLinear."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from viditq.errors import UserError
from viditq.quant import (
    Chain,
    LayerScheme,
    QuantLinear,
    QuantSpec,
    Recipe,
    Rule,
    StepContext,
    Variant,
    get_backend,
    linear_names,
    quantize_denoiser,
)
from viditq.quant.numerics.low_rank import fit_low_rank, truncated

W4 = QuantSpec(4, granularity="channel")
A8 = QuantSpec(8, granularity="token", dynamic=True)


def outlying(out_features: int = 40, in_features: int = 64) -> torch.Tensor:
    """Gaussian, with a few strong directions and loud input channels."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    weight += 3 * torch.randn(out_features, 3, generator=generator) @ torch.randn(3, in_features, generator=generator)
    weight[:, 5] *= 10
    return weight


@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (32, 32)])
@pytest.mark.parametrize("rank", [1, 4, 31])
def test_truncation_is_that_of_the_svd(shape, rank):
    weight = outlying(*shape)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    up, down = truncated(weight, rank)
    assert up.shape == (shape[0], rank) and down.shape == (rank, shape[1])
    torch.testing.assert_close(up @ down, u[:, :rank] * s[:rank] @ v[:rank], rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), rtol=1e-3, atol=1e-3)


def test_from_a_neighbours_basis_it_comes_about_as_near():
    weight = outlying(64, 96)
    start = truncated(weight, 8)[0]
    near = weight + 0.1 * torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    ours, best = ((near - up @ down).norm() for up, down in (truncated(near, 8, start), truncated(near, 8)))
    assert best * (1 - 1e-5) <= ours < 1.01 * best


def test_a_weight_of_lower_rank_gives_finite_factors():
    up, down = truncated(torch.ones(8, 6), 3)
    torch.testing.assert_close(up @ down, torch.ones(8, 6), rtol=1e-4, atol=1e-4)


def test_alternation_never_ends_worse_than_it_began():
    weight = outlying()

    def quantized(rest):
        scale = rest.abs().amax(1, True) / 3
        return (rest / scale).round() * scale

    errors = []
    for iterations in (1, 2, 5, 10):
        up, down = fit_low_rank(weight, 4, torch.float32, quantized, lambda d: d.square().sum(), iterations)
        rest = weight - up @ down
        errors.append(float((rest - quantized(rest)).square().sum()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]


def layer_of(scheme: LayerScheme, dtype: torch.dtype, x: torch.Tensor | None = None):
    linear = nn.Linear(64, 40)
    linear.weight.data = outlying()
    linear = linear.to(dtype)
    moments = None if x is None else x.float().T @ x.float()
    variant = Variant.fit(scheme, linear.weight, Chain(), None, None if moments is None else moments.clone)
    layer = QuantLinear("layer", linear.bias, [variant], [0], 40, StepContext((0, 1)), get_backend("fake"))
    layer.prepare()
    return linear, layer


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_the_branch_takes_the_outliers(rounding):
    x, errors = torch.randn(200, 64), []
    torch.manual_seed(0)
    for rank in (None, 2, 8, 16):
        linear, layer = layer_of(LayerScheme(W4, A8, rounding=rounding, low_rank=rank), torch.float32, x)
        errors.append(float((layer(x) - linear(x)).norm().detach()))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.5 * errors[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_sum_of_both_branches(dtype):
    scheme = LayerScheme(W4, None, low_rank=4)
    linear, layer = layer_of(scheme, dtype)
    variant, x = layer.variants[0], torch.randn(2, 7, 64).to(dtype)
    assert variant.low_rank_up.dtype == variant.low_rank_down.dtype == dtype
    whole = variant.dequantized_weight().double() + variant.low_rank_up.double() @ variant.low_rank_down.double()
    want = F.linear(x.double(), whole, linear.bias.double())
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    error = float(((layer(x).double() - want).norm() / want.norm()).detach())
    assert layer(x).dtype == dtype and error < tolerance
    if dtype == torch.float32:
        assert torch.equal(variant.low_rank_up.half().float(), variant.low_rank_up)  # 16 bits in a file


def test_bits_count_the_branch():
    plan = Recipe(W4, A8, low_rank=8, rules=[Rule("b", low_rank=2)]).resolve(["a", "b"])
    numel, inputs = {"a": 40 * 64, "b": 40 * 64}, {"a": 64, "b": 64}
    want = 4 + 16 * (8 + 2) / 2 * (40 + 64) / (40 * 64)
    assert plan.average_weight_bits(numel, inputs) == pytest.approx(want)
    with pytest.raises(UserError, match="layer a has a low-rank branch"):
        plan.average_weight_bits(numel)
    assert plan.average_activation_bits(inputs) == 8


def test_bad_input(denoiser):
    for rank in (0, -1, 2.5, True, "8"):
        with pytest.raises(UserError, match=r"low_rank=.* is not possible"):
            LayerScheme(W4, A8, low_rank=rank)
    with pytest.raises(UserError, match="low_rank needs a quantized weight"):
        LayerScheme(None, A8, low_rank=8)
    plan = Recipe(W4, A8, low_rank=8).resolve(linear_names(denoiser))
    with pytest.raises(UserError, match=r"low_rank=8 is no lower than the rank of proj_in, a weight of 16 x 8"):
        quantize_denoiser(denoiser, plan, None)
