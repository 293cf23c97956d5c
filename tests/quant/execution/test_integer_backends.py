"""Backends of int8 products against `fake`, whatever multiplies: same codes, exact sums.

Triton's kernels run under its interpreter where there is no GPU (tests/conftest.py), a millisecond a block of each
operation, so that they get fewer and smaller cases; `-m slow` has all formats.
"""

import copy

import pytest
import torch
from agreement import DTYPES, activation_formats, assert_agrees, chains, home_of, variant_of, weight_formats

from viditq.quant import QuantSpec
from viditq.quant.execution.backends import Backend, get_backend
from viditq.quant.execution.backends.auto import why_unavailable

TOKEN, CHANNEL = QuantSpec(8, False, "token", None, True), QuantSpec(8, False, "channel")
NAMES = ("portable", "triton")
REASONS = {name: why_unavailable(get_backend(name)) for name in NAMES}


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> Backend:
    if REASONS[request.param] is not None:
        pytest.skip(f"no {request.param} here: {REASONS[request.param]}")
    torch.manual_seed(0)
    return get_backend(request.param)


def agrees_in(backend: Backend, activation: QuantSpec, weights: list[QuantSpec], rows: tuple[int, ...]) -> None:
    for i, weight in enumerate(weights):
        dtype = DTYPES[i % 3]
        x, weight_OC = torch.randn(*rows, 192).to(dtype), torch.randn(50, 192).to(dtype)
        assert_agrees(backend, variant_of(weight, activation, x, weight_OC), x, torch.randn(50).to(dtype))


@pytest.mark.parametrize("activation", activation_formats())
def test_agrees_with_fake_in_every_format(backend: Backend, activation: str) -> None:
    weights, place = [*weight_formats().values()], [*activation_formats()].index(activation)
    interpreted = backend.name == "triton"
    few = [weights[(place + i * 7) % len(weights)] for i in range(2)]
    spec = activation_formats()[activation]
    agrees_in(backend, spec, few if interpreted else weights, (2, 1) if interpreted else (3, 7))


@pytest.mark.slow
@pytest.mark.parametrize("activation", activation_formats())
def test_agrees_with_fake_in_every_pair_of_formats(backend: Backend, activation: str) -> None:
    agrees_in(backend, activation_formats()[activation], [*weight_formats().values()], (3, 7))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 50), (17, 100, 50), (5, 9, 1), (65, 130, 65)])
def test_any_shape(backend: Backend, shape: tuple[int, int, int]) -> None:
    rows, in_features, out_features = shape
    x, weight = torch.randn(rows, in_features), torch.randn(out_features, in_features)
    for activation in (TOKEN, QuantSpec(8), QuantSpec(8, True, "tensor", None, True)):
        assert_agrees(backend, variant_of(QuantSpec(4, False, "channel"), activation, x, weight), x, None)


def test_rows_there_are_none_of_and_a_single_vector(backend: Backend) -> None:
    for spec in activation_formats().values():
        variant = variant_of(CHANNEL, spec, torch.randn(4, 64), torch.randn(50, 64))
        assert_agrees(backend, copy.deepcopy(variant), torch.randn(64), torch.randn(50))
        home = home_of(backend)
        backend.prepare(variant.to(home))
        for shape in ((0, 64), (2, 0, 64)):
            assert backend.linear(variant, torch.empty(shape, device=home), None).shape == (*shape[:-1], 50)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_extreme_scales(backend: Backend, scale: float) -> None:
    for x_scale, weight_scale in ((scale, 1.0), (1.0, scale), (scale, 1 / scale)):
        x, weight = torch.randn(5, 64) * x_scale, torch.randn(50, 64) * weight_scale
        assert_agrees(backend, variant_of(CHANNEL, TOKEN, x, weight), x, None)


def test_sums_that_need_more_than_32_bits_are_cut_into_parts(backend: Backend) -> None:
    x, weight = torch.full((2, 70_000), 3.0), torch.full((3, 70_000), -2.0)
    weight[:, 0] = 1e-3
    assert_agrees(backend, variant_of(CHANNEL, TOKEN, x, weight), x, None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_stay_in_their_row(backend: Backend, bad: float) -> None:
    x, weight = torch.randn(5, 64), torch.randn(50, 64)
    for spec in (TOKEN, QuantSpec(8, True, "token", None, True), QuantSpec(4, False, "group", 32, True)):
        variant = variant_of(CHANNEL, spec, x, weight)
        home = home_of(backend)
        backend.prepare(variant.to(home))
        spoilt = x.clone().to(home)
        spoilt[2, 5] = bad
        assert backend.linear(variant, spoilt, None).isnan().all(1).tolist() == [False, False, True, False, False]


def test_chains_and_the_low_rank_branch(backend: Backend) -> None:
    x, weight = torch.randn(2, 3, 96), torch.randn(50, 96)
    for _, chain in chains(96):
        for low_rank in (None, 4):
            assert_agrees(backend, variant_of(CHANNEL, TOKEN, x, weight, chain, low_rank), x, torch.randn(50))


def test_codes_lie_in_memory_once_and_come_back_for_the_state_dict(backend: Backend) -> None:
    for spec in weight_formats().values():
        variant = variant_of(spec, TOKEN, torch.randn(4, 128), torch.randn(64, 128))
        before, dense = copy.deepcopy(variant.state_dict()), variant.dequantized_weight()
        backend.prepare(variant)
        after = variant.state_dict()
        assert variant.qweight is None
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
        assert torch.equal(variant.dequantized_weight(), dense)
        counted = backend.weight_bytes(variant.scheme, 64, 128, torch.float32)
        held = sum(tensor.nbytes for tensor in variant.held_tensors())
        assert held in (counted, counted - 64 * (128 // (spec.group_size or 128)))  # no zero points where all are 0
