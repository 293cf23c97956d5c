"""Against numbers of the original public code. There, "token" shares a scale over the batch (emulated here by
laying the batch out along the features); `per_batch_element` and `isolated` are what we do."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.methods.quantizer import dequantize_weight, fake_quantize_activation, quantize_weight
from viditq.quant.numerics import granularity
from viditq.quant.numerics.affine import compute_qparams, dequantize, fake_quantize, fake_quantize_own_range, quantize

with safe_open(Path(__file__).parents[2] / "data" / "golden" / "quantizer.safetensors", "pt") as file:
    CASES = sorted({key.rsplit("/", 1)[0] for key in file.keys() if not key.startswith(("in/", "in2/"))})  # noqa: SIM118


def cases(prefix: str) -> list[str]:
    return [case for case in CASES if case.startswith(prefix)]


def parse(case: str) -> tuple[str, str, bool, int]:
    *_, name, group, sign, bits = case.split("/")
    return name, group, sign == "sym", int(bits)


def check(golden: dict[str, Tensor], case: str, scale: Tensor, zero_point: Tensor, codes: Tensor, y: Tensor) -> None:
    assert torch.equal(scale.reshape(golden[f"{case}/delta"].shape), golden[f"{case}/delta"])
    assert torch.equal(zero_point.reshape(golden[f"{case}/zero_point"].shape), golden[f"{case}/zero_point"])
    assert torch.equal(y, golden[f"{case}/y"])
    if f"{case}/q" in golden:
        assert torch.equal(codes.reshape(golden[f"{case}/q"].shape), golden[f"{case}/q"])


TINY = cases("isolated/weight/w_tiny_row")
WEIGHTS = [case for case in cases("weight/") + cases("isolated/") if case not in TINY]


@pytest.mark.parametrize("case", WEIGHTS)
def test_weight(golden_quantizer, case):
    name, group, symmetric, bits = parse(case)
    weight = golden_quantizer[f"in/{name}"]
    scale, zero_point = compute_qparams(*granularity.weight_range(weight, group, None), bits, symmetric)
    codes = quantize(weight, scale, zero_point, bits, symmetric)
    check(golden_quantizer, case, scale, zero_point, codes, dequantize(codes, scale, zero_point))


@pytest.mark.parametrize("case", [c for c in WEIGHTS if "fp16" not in c])
def test_stored_weight(golden_quantizer, case):
    name, group, symmetric, bits = parse(case)
    spec = QuantSpec(bits, symmetric, group)
    quantized = quantize_weight(golden_quantizer[f"in/{name}"], spec)
    assert int(quantized.codes.max()) < 2**bits
    assert torch.equal(dequantize_weight(quantized, spec), golden_quantizer[f"{case}/y"])


@pytest.mark.parametrize("case", TINY)
def test_a_tiny_row_has_a_scale_as_small_as_it_is(golden_quantizer, case):
    """Its values reach 6.7e-8. The original's scales end at 1e-6, which leaves nothing of it; other rows are alike."""
    name, group, symmetric, bits = parse(case)
    weight, spec = golden_quantizer[f"in/{name}"], QuantSpec(bits, symmetric, group)
    tiny = weight.abs().amax(1) < 1e-6
    quantized = quantize_weight(weight, spec)
    y = dequantize_weight(quantized, spec)
    assert tiny.sum() == 1 and torch.equal(y[~tiny], golden_quantizer[f"{case}/y"][~tiny])
    assert torch.equal(quantized.scale[~tiny], golden_quantizer[f"{case}/delta"].view(-1, 1)[~tiny])
    scaled = torch.where(tiny[:, None], weight * 2.0**20, weight)
    assert torch.equal(y[tiny] * 2.0**20, dequantize_weight(quantize_weight(scaled, spec), spec)[tiny])


@pytest.mark.parametrize("case", cases("per_batch_element/"))
def test_dynamic_token(golden_quantizer, case):
    name, group, symmetric, bits = parse(case)
    x = golden_quantizer[f"in/{name}"]
    scale, zero_point = compute_qparams(*granularity.activation_range(x, group, None), bits, symmetric)
    codes = quantize(x, scale, zero_point, bits, symmetric)
    y = fake_quantize_activation(x, QuantSpec(bits, symmetric, group, dynamic=True), None)
    check(golden_quantizer, case, scale, zero_point, codes, y)


def as_one_sample(x_BNC: Tensor, group: str) -> Tensor:
    """Lays the batch out so that our per-sample groups are the original's shared ones."""
    return x_BNC.transpose(0, 1).flatten(1)[None] if group == "token" else x_BNC.flatten(0, 1)[None]


def from_one_sample(y: Tensor, like: Tensor, group: str) -> Tensor:
    return y[0].unflatten(-1, (len(like), -1)).transpose(0, 1) if group == "token" else y[0].view_as(like)


@pytest.mark.parametrize("case", cases("act_dynamic/"))
def test_dynamic_with_scales_shared_over_the_batch(golden_quantizer, case):
    name, group, symmetric, bits = parse(case)
    for source, result in (("in", "y"), ("in2", "y2")):
        x = golden_quantizer[f"{source}/{name}"]
        laid = as_one_sample(x, group)
        lo, hi = granularity.activation_range(laid, group, None)
        y = fake_quantize_own_range(laid, lo, hi, bits, symmetric)
        assert torch.equal(from_one_sample(y, x, group), golden_quantizer[f"{case}/{result}"])
        if source == "in":
            scale, zero_point = compute_qparams(lo, hi, bits, symmetric)
            codes = from_one_sample(quantize(laid, scale, zero_point, bits, symmetric), x, group)
            check(golden_quantizer, case, scale, zero_point, codes, golden_quantizer[f"{case}/y"])


@pytest.mark.parametrize("case", [c for c in cases("act_static/") if "/tensor/" in c])
def test_static_tensor(golden_quantizer, case):
    name, _, symmetric, bits = parse(case)
    x = golden_quantizer[f"in/{name}"]
    extremes = (x.amin((0, 1)), x.amax((0, 1)))
    scale, zero_point = compute_qparams(*granularity.calibrated_range(*extremes, "tensor", None), bits, symmetric)
    codes = quantize(x, scale, zero_point, bits, symmetric)
    check(golden_quantizer, case, scale, zero_point, codes, fake_quantize(x, scale, zero_point, bits, symmetric))
    later = fake_quantize(golden_quantizer[f"in2/{name}"], scale, zero_point, bits, symmetric)
    assert torch.equal(later, golden_quantizer[f"{case}/y2"])
