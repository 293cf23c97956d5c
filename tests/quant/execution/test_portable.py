"""Library operations alone against `fake`: same codes, exact sums."""

import copy

import pytest
import torch
from agreement import DTYPES, activation_formats, assert_agrees, chains, variant_of, weight_formats

from viditq.quant import QuantSpec
from viditq.quant.execution.backends import PortableBackend, Unavailable, portable

TOKEN, CHANNEL = QuantSpec(8, False, "token", None, True), QuantSpec(8, False, "channel")


@pytest.fixture
def backend() -> PortableBackend:
    torch.manual_seed(0)
    if not portable.exact_product("cpu"):
        pytest.skip("torch._int_mm is not exact on this machine")
    return PortableBackend()


@pytest.mark.parametrize("activation", activation_formats())
def test_agrees_with_fake_in_every_format(backend, activation):
    spec = activation_formats()[activation]
    for i, weight in enumerate(weight_formats().values()):
        dtype = DTYPES[i % 3]
        x, weight_OC = torch.randn(3, 7, 192).to(dtype), torch.randn(50, 192).to(dtype)
        assert_agrees(backend, variant_of(weight, spec, x, weight_OC), x, torch.randn(50).to(dtype))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 50), (77, 100, 50), (5, 9, 1), (129, 130, 65)])
def test_any_shape(backend, shape):
    rows, in_features, out_features = shape
    x, weight = torch.randn(rows, in_features), torch.randn(out_features, in_features)
    for activation in (TOKEN, QuantSpec(8), QuantSpec(8, True, "tensor", None, True)):
        assert_agrees(backend, variant_of(QuantSpec(4, False, "channel"), activation, x, weight), x, None)


def test_rows_there_are_none_of_and_a_single_vector(backend):
    for spec in activation_formats().values():
        variant = variant_of(CHANNEL, spec, torch.randn(4, 64), torch.randn(50, 64))
        assert_agrees(backend, copy.deepcopy(variant), torch.randn(64), torch.randn(50))
        backend.prepare(variant)
        for shape in ((0, 64), (2, 0, 64)):
            assert backend.linear(variant, torch.empty(shape), None).shape == (*shape[:-1], 50)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_extreme_scales(backend, scale):
    for x_scale, weight_scale in ((scale, 1.0), (1.0, scale), (scale, 1 / scale)):
        x, weight = torch.randn(9, 64) * x_scale, torch.randn(50, 64) * weight_scale
        assert_agrees(backend, variant_of(CHANNEL, TOKEN, x, weight), x, None)


def test_sums_that_need_more_than_32_bits_are_cut_into_parts(backend):
    x, weight = torch.full((2, 70_000), 3.0), torch.full((3, 70_000), -2.0)
    weight[:, 0] = 1e-3
    assert_agrees(backend, variant_of(CHANNEL, TOKEN, x, weight), x, None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_stay_in_their_row(backend, bad):
    x, weight = torch.randn(5, 64), torch.randn(50, 64)
    variant = variant_of(CHANNEL, TOKEN, x, weight)
    backend.prepare(variant)
    x[2, 5] = bad
    assert backend.linear(variant, x, None).isnan().all(1).tolist() == [False, False, True, False, False]


def test_chains_and_the_low_rank_branch(backend):
    x, weight = torch.randn(2, 9, 96), torch.randn(50, 96)
    for _, chain in chains(96):
        for low_rank in (None, 4):
            assert_agrees(backend, variant_of(CHANNEL, TOKEN, x, weight, chain, low_rank), x, torch.randn(50))


def test_codes_lie_in_memory_once_and_come_back_for_the_state_dict(backend):
    for spec in weight_formats().values():
        variant = variant_of(spec, TOKEN, torch.randn(4, 128), torch.randn(50, 128))
        before = copy.deepcopy(variant.state_dict())
        backend.prepare(variant)
        after = variant.state_dict()
        assert variant.qweight is None
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_steps_aside_where_the_product_saturates(monkeypatch):
    """What CPUs without VNNI do: pairs of products are added up in 16 bits."""

    def saturating(codes, weight):
        products = codes.to(torch.int32)[..., None] * weight.to(torch.int32)
        pairs = (products[:, 0::2] + products[:, 1::2]).clamp(-(2**15), 2**15 - 1)
        return pairs.sum(1, dtype=torch.int32)

    portable.exact_product.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", saturating)
    variant = variant_of(CHANNEL, TOKEN, torch.randn(4, 64), torch.randn(50, 64))
    with pytest.raises(Unavailable, match="not exact") as raised:
        PortableBackend().prepare(variant)
    with pytest.raises(Unavailable):
        PortableBackend().check_available()
    assert raised.value.reason
    assert variant.qweight is not None, "nothing was changed"
    portable.exact_product.cache_clear()
