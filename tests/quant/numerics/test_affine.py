import pytest
import torch

from viditq.quant.numerics.affine import (
    EMPTY_SCALE,
    code_range,
    compute_qparams,
    dequantize,
    divisor,
    fake_quantize,
    fake_quantize_own_range,
    quantize,
)


def naive(x: list[float], bits: int, symmetric: bool) -> tuple[float, int, list[int]]:
    """Scalar reference in python floats; python's round is half to even."""
    if symmetric:
        scale, zero_point = max(map(abs, x)) / (2 ** (bits - 1) - 1), 0
    else:
        lo, hi = min(*x, 0), max(*x, 0)
        scale = (hi - lo) / (2**bits - 1)
        zero_point = round(-lo / scale)
    low, high = code_range(bits, symmetric)
    return scale, zero_point, [min(max(round(v / scale) + zero_point, low), high) for v in x]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shift", [-5.0, 0.0, 0.7, 5.0])
def test_matches_scalar_reference(bits, symmetric, shift):
    x = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(bits)) + shift
    scale, zero_point = compute_qparams(x.amin(0, True), x.amax(0, True), bits, symmetric)
    want_scale, want_zero_point, want_codes = naive(x.tolist(), bits, symmetric)
    assert scale.item() == want_scale
    assert zero_point.item() == want_zero_point
    assert quantize(x, scale, zero_point, bits, symmetric).tolist() == want_codes


def test_rounds_half_to_even():
    one, zero = torch.ones(1), torch.zeros(1)
    assert quantize(torch.tensor([0.5, 1.5, 2.5, 3.5]), one, zero, 4, False).tolist() == [0, 2, 2, 4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("inplace", [False, True])
def test_fake_quantize_is_the_round_trip_in_every_dtype(dtype, symmetric, bits, inplace):
    torch.manual_seed(0)
    x = (torch.randn(64, 40) * torch.logspace(-3, 2, 64)[:, None]).to(dtype)
    lo, hi = x.amin(-1, True), x.amax(-1, True)
    scale, zero_point = compute_qparams(lo, hi, bits, symmetric)
    want = dequantize(quantize(x, scale, zero_point, bits, symmetric), scale, zero_point)
    got = fake_quantize(x.clone(), scale, zero_point, bits, symmetric, inplace)
    own = fake_quantize_own_range(x.clone(), lo, hi, bits, symmetric, inplace)
    assert got.dtype == own.dtype == dtype
    assert torch.equal(got, want)
    assert torch.equal(own, want)


def test_not_inplace_leaves_the_input_alone():
    x = torch.randn(3, 8)
    kept = x.clone()
    fake_quantize_own_range(x, x.amin(-1, True), x.amax(-1, True), 8, False)
    assert torch.equal(x, kept)


def test_zero_group_keeps_its_neighbours_scale():
    x = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    scale, _ = compute_qparams(x.amin(-1, True), x.amax(-1, True), 4, False)
    assert scale.flatten().tolist() == pytest.approx([EMPTY_SCALE, 3 / 15])
    assert torch.isfinite(fake_quantize_own_range(x, x.amin(-1, True), x.amax(-1, True), 4, False)).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_error_is_at_most_half_a_step_inside_the_grid(bits, symmetric):
    x = torch.randn(16, 64, dtype=torch.float64)
    lo, hi = x.amin(-1, True), x.amax(-1, True)
    scale, _ = compute_qparams(lo, hi, bits, symmetric)
    error = (fake_quantize_own_range(x, lo, hi, bits, symmetric) - x).abs()
    assert (error <= scale * (0.5 if symmetric else 1.0) + 1e-12).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_full_range_of_a_symmetric_grid(bits):
    """scale = amax / ((2^b - 1) / 2): the smallest code is reached, the largest value is cut by half a step."""
    x = torch.tensor([[-3.0, 0.2, 2.9], [1.0, 3.0, 0.0], [0.0, 0.0, 0.0]])
    lo, hi = x.amin(-1, True), x.amax(-1, True)
    scale, zero_point = compute_qparams(lo, hi, bits, True, full_range=True)
    assert torch.equal(scale[:2, 0], torch.tensor([3.0, 3.0]) / ((2**bits - 1) / 2)) and not zero_point.any()
    codes = quantize(x, scale, zero_point, bits, True, full_range=True)
    assert codes[0, 0] == -(2 ** (bits - 1)) and codes[1, 1] == 2 ** (bits - 1) - 1 and not codes[2].any()
    expected = dequantize(codes, scale, zero_point)
    assert torch.equal(fake_quantize_own_range(x, lo, hi, bits, True, full_range=True), expected)


def test_on_a_gpu_ranges_are_divided_by_tensors():
    """By a number torch multiplies by its reciprocal there, which gives other scales."""
    x = torch.rand(4096, generator=torch.Generator().manual_seed(0))
    for number in (127.5, 127, 448.0):
        assert (x / number != x * (1 / torch.tensor(float(number)))).float().mean() > 0.01
        there = divisor(number, torch.device("meta"))
        assert isinstance(there, torch.Tensor) and there.device.type == "meta" and there.dtype == torch.float32
        assert divisor(number, x.device) == number
