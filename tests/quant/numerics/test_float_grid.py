"""FP8 and FP4 numbers and scales: values written out from the OCP and NVIDIA definitions, the nearest by trial."""

import math

import pytest
import torch

from viditq.quant import QuantSpec
from viditq.quant.methods.quantizer import dequantize_weight, fake_quantize_activation, quantize_weight
from viditq.quant.numerics import float_grid
from viditq.quant.numerics.float_grid import NUMBERS, codes_of, power_scale, rounded, two_level_scale, values_of


def pattern(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """The number of a bit pattern, without regard to NaN and infinity."""
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    exponent, mantissa = code >> mantissa_bits & (2**exponent_bits - 1), code & (2**mantissa_bits - 1)
    bias = 2 ** (exponent_bits - 1) - 1
    whole = 0 if exponent == 0 else 1
    return sign * 2.0 ** (max(exponent, 1) - bias) * (whole + mantissa / 2**mantissa_bits)


TABLES = {
    "e2m1": [pattern(code, 2, 1) for code in range(16)],
    "e4m3": [pattern(code, 4, 3) for code in range(256)],
    "e5m2": [pattern(code, 5, 2) for code in range(256)],
}
FINITE = {name: [v for v in table if abs(v) <= NUMBERS[name].largest] for name, table in TABLES.items()}


@pytest.mark.parametrize("number", TABLES)
def test_codes_are_the_bit_patterns(number):
    codes = torch.tensor([c for c, v in enumerate(TABLES[number]) if v in FINITE[number]], dtype=torch.uint8)
    values = values_of(codes, number)
    assert values.tolist() == FINITE[number]
    assert torch.equal(rounded(values, number), values) and torch.equal(codes_of(values, number), codes)
    assert max(FINITE[number]) == NUMBERS[number].largest and math.log2(NUMBERS[number].largest) // 1 == (
        NUMBERS[number].exponent
    )


@pytest.mark.parametrize("number", TABLES)
def test_the_nearest_number_is_taken_ties_to_the_even_one(number):
    grid = torch.tensor(sorted({*FINITE[number]}))
    middles = (grid[1:] + grid[:-1]) / 2
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(4000, generator=generator) * torch.logspace(-9, 5, 4000, base=2.0)
    x = torch.cat([middles, spread, torch.tensor([1e9, -1e9])])
    found = rounded(x, number)
    distance = (x.clamp(-grid[-1], grid[-1])[:, None].double() - grid.double()).abs()
    assert torch.equal((found.double() - x.clamp(-grid[-1], grid[-1]).double()).abs(), distance.amin(1))
    even = codes_of(rounded(middles, number), number) % 2
    assert not even.any()  # the mantissa's last bit
    assert rounded(torch.tensor([float("nan")]), number).isnan().all()


def test_microscaling_takes_the_power_of_two_below():
    amax = torch.tensor([6.0, 7.9, 8.0, 4.0, 3.99, 0.0, 2.0**-130, float("inf")])
    assert power_scale(amax, "e2m1").tolist() == [1.0, 1.0, 2.0, 1.0, 0.5, 2.0**-127, 2.0**-127, float("inf")]
    x = torch.tensor([[7.9, -5.0, 0.25, 0.75] + [0.0] * 28])
    spec = QuantSpec(4, True, "group", 32, number="e2m1", block_scale="e8m0")
    assert dequantize_weight(quantize_weight(x, spec), spec)[0, :4].tolist() == [6.0, -4.0, 0.0, 1.0]


def test_nvfp4_has_two_levels_of_scales():
    scale, whole = two_level_scale(torch.tensor([[2688.0], [6.0], [0.0]]), torch.tensor(2688.0), "e2m1")
    assert whole == 1.0 and scale.flatten().tolist() == [448.0, 1.0, 2.0**-6]
    scale, whole = two_level_scale(torch.tensor([2688.0 * 3, 3 * 6 * 1.06]), torch.tensor(2688.0 * 3), "e2m1")
    assert whole == 3.0 and scale.tolist() == [448.0 * 3, 3.0]  # 1.06 lies between 1 and 1.125


FORMATS = {
    "fp8": QuantSpec(8, True, "channel", number="e4m3"),
    "fp8 e5m2": QuantSpec(8, True, "tensor", number="e5m2"),
    "mxfp8": QuantSpec(8, True, "group", 32, number="e4m3", block_scale="e8m0"),
    "mxfp4": QuantSpec(4, True, "group", 32, number="e2m1", block_scale="e8m0"),
    "nvfp4": QuantSpec(4, True, "group", 16, number="e2m1", block_scale="e4m3"),
}


@pytest.mark.parametrize("power", [-40, 0, 40])
@pytest.mark.parametrize("name", FORMATS)
def test_a_power_of_two_changes_scales_alone(name, power):
    spec, generator = FORMATS[name], torch.Generator().manual_seed(1)
    weight = torch.randn(24, 64, generator=generator) * torch.logspace(-1, 1, 24)[:, None]
    plain, scaled = quantize_weight(weight, spec), quantize_weight(2.0**power * weight, spec)
    assert torch.equal(plain.codes, scaled.codes)
    restored = dequantize_weight(plain, spec)
    assert torch.equal(dequantize_weight(scaled, spec), 2.0**power * restored)
    assert (plain.scale.dtype == torch.uint8) == (spec.block_scale is not None)
    error = (restored - weight).norm() / weight.norm()
    assert error < (0.13 if spec.bits == 4 else 0.07)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "nvfp4"])
def test_an_activation_does_not_depend_on_its_batch_mates(name):
    spec = QuantSpec(**{**FORMATS[name].to_dict(), "dynamic": True})
    x = (
        torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(2))
        * torch.tensor([1.0, 100.0, 0.0])[:, None, None]
    )
    together = fake_quantize_activation(x, spec, None)
    alone = torch.cat([fake_quantize_activation(one[None], spec, None) for one in x])
    assert torch.equal(together, alone) and not together[2].any()
    as_weight = FORMATS[name]
    assert torch.equal(dequantize_weight(quantize_weight(x[0], as_weight), as_weight), together[0])
    assert float_grid.rounded(x, spec.number).dtype == torch.float32
    x[0, 0, 3] = float("nan")
    spoiled = fake_quantize_activation(x, spec, None)
    assert spoiled[0, 0, 3].isnan() and torch.equal(spoiled[1:], together[1:])


@pytest.mark.parametrize("number", TABLES)
def test_ml_dtypes_rounds_the_same(number):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: pip install ml_dtypes")
    other = getattr(ml_dtypes, {"e2m1": "float4_e2m1fn", "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}[number])
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(3)) * torch.logspace(-9, 5, 50_000, base=2.0)
    x = x.clamp(-NUMBERS[number].largest, NUMBERS[number].largest)  # beyond it the two have other rules
    assert torch.equal(rounded(x, number), torch.from_numpy(x.numpy().astype(other).astype("float32")))


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "nvfp4"])
def test_torchao_has_the_same_blocks(name):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="torchao is not installed")
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(4)) * torch.logspace(-3, 2, 64)[:, None]
    weight[3] = 0
    if name == "nvfp4":
        theirs = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=per_tensor_amax_to_scale(weight.abs().max()))
    else:
        dtype = torch.float8_e4m3fn if name == "mxfp8" else torch.float4_e2m1fn_x2
        theirs = mx.MXTensor.to_mx(weight, dtype, 32)
    ours = dequantize_weight(quantize_weight(weight, FORMATS[name]), FORMATS[name])
    assert torch.equal(ours, theirs.dequantize(torch.float32))
