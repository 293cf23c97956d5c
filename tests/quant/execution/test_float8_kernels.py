"""The kernels of FP8: codes of `fake` to the last one, products within their bound, and the operators around them."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from agreement import DTYPES, assert_agrees, chains, exact_output, formats, graphs_of_segments, layer_of, variant_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from viditq.quant import QuantSpec
from viditq.quant.execution.backends import ScaledMmBackend
from viditq.quant.execution.backends.auto import why_unavailable
from viditq.quant.execution.backends.cuda import choice as trials
from viditq.quant.execution.backends.cuda.choice import disagreement
from viditq.quant.execution.backends.scaled_mm import backend as module
from viditq.quant.execution.backends.scaled_mm.product import (
    MULTIPLE,
    Float8Product,
    Float8Weight,
    _by_triton,
    candidates_for,
)
from viditq.quant.execution.backends.triton import float8, ops
from viditq.quant.execution.backends.triton.backend import why_not
from viditq.quant.execution.backends.triton.tiles import FEW, Tile
from viditq.quant.execution.surroundings import After, Before
from viditq.quant.methods.quantizer import narrow_activation

REASON = why_not() or why_unavailable(ScaledMmBackend())
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no FP8 kernels here: {REASON}")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUMBERS = ("e4m3", "e5m2")
FORMATS = formats()
CHANNEL, TOKEN = FORMATS["fp8_e4m3_channel"], FORMATS["fp8_e4m3_token"]
ACTIVATIONS = [FORMATS[f"fp8_{number}_{kind}"] for number in NUMBERS for kind in ("token", "tensor")]
ACTIVATIONS.append(QuantSpec(8, True, "tensor", dynamic=True, number="e4m3"))


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    torch.manual_seed(0)
    trials._choices.clear()
    float8.load()
    yield
    trials._choices.clear()


@pytest.fixture
def one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel quantizes, as it does on a GPU."""
    monkeypatch.setattr(module, "ONE_PASS", (DEVICE,))


def token(number: str) -> QuantSpec:
    return QuantSpec(8, True, "token", dynamic=True, number=number)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape).to(DEVICE)


def assert_same(found: Tensor, wanted: Tensor) -> None:
    """Bit for bit; one NaN is as good as another."""
    found, nan = found.cpu(), wanted.float().isnan()
    assert torch.equal(found.float().isnan(), nan)
    assert torch.equal(found.view(torch.uint8)[~nan], wanted.view(torch.uint8)[~nan])


@pytest.mark.parametrize("number", NUMBERS)
def test_every_half_and_its_neighbours_become_the_code_of_fake(number: str) -> None:
    """Of all float16 numbers and the float32 ones beside them: ties, subnormal and largest numbers, signs, NaN."""
    halves = torch.arange(2**16).to(torch.int16).view(torch.float16).float()
    bits = halves.view(torch.int32)
    x_MC = torch.stack([halves, (bits + 1).view(torch.float32), (bits - 1).view(torch.float32)]).view(24, -1)
    one = torch.ones(1)
    wanted, _ = narrow_activation(x_MC, QuantSpec(8, True, "tensor", number=number), (one, one))
    found, scale = float8.quantize(x_MC.to(DEVICE), x_MC.shape[1], wanted.dtype, scale=one.to(DEVICE))
    assert_same(found, wanted)
    assert scale.shape == (1, 1) and wanted.float().unique().numel() > 250 // 2


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("width", [1, 33, 1160])
def test_rows_find_the_scale_of_fake(width: int, number: str) -> None:
    """Scales from 1e-38 to 1e37, a row of zeros, one with NaN, one with infinity; padded with zeros."""
    padded = width + -width % MULTIPLE
    for dtype, least in zip(DTYPES, (-38, -32, -38), strict=True):  # the interpreter has no subnormal bfloat16
        x = (torch.randn(9, width) * torch.logspace(least, 37, 9)[:, None]).to(dtype)
        x[3] = 0
        x[4, width // 2], x[5, width // 3] = torch.nan, -torch.inf
        wanted, step = narrow_activation(x, token(number), None)
        found, scale = float8.quantize(x.to(DEVICE), padded, wanted.dtype)
        assert_same(found[:, :width], wanted)
        assert torch.equal(scale.cpu().nan_to_num(7.0), step.nan_to_num(7.0))
        assert not found.view(torch.uint8)[:, width:].any()


def test_a_row_as_wide_as_any_model_s() -> None:
    x = torch.randn(2, 15_360)
    wanted, step = narrow_activation(x, TOKEN, None)
    found, scale = float8.quantize(x.to(DEVICE), 15_360, wanted.dtype)
    assert_same(found, wanted)
    assert torch.equal(scale.cpu(), step)


@pytest.mark.parametrize("spec", ACTIVATIONS, ids=lambda spec: f"{spec.label}-{spec.granularity}-{spec.dynamic}")
def test_in_one_pass_it_is_what_several_are(spec: QuantSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Static and dynamic, smoothed, rotated, with a branch, of any float; samples apart."""
    for i, (_, chain) in enumerate(chains(96)):
        x = (torch.randn(2, 2, 96) * torch.tensor([1.0, 30.0])[:, None, None]).to(DTYPES[i % 3])
        variant = variant_of(CHANNEL, spec, x, torch.randn(32, 96), chain, low_rank=4 if i % 2 else None).to(DEVICE)
        backend = ScaledMmBackend()
        backend.prepare(variant)
        assert backend.has_kernel
        outs = []
        for devices in ((), (DEVICE,)):
            monkeypatch.setattr(module, "ONE_PASS", devices)
            outs.append(backend.linear(variant, x.to(DEVICE), None))
        assert torch.equal(*outs)


@pytest.mark.skipif(DEVICE == "cuda", reason="the bound is that of a CPU's product")
def test_with_the_kernel_it_agrees_with_fake_in_any_shape(one_pass: None) -> None:
    for rows, width, outs in ((1, 40, 50), (17, 33, 7)):
        x, weight = torch.randn(rows, width), torch.randn(outs, width)
        assert_agrees(ScaledMmBackend(), variant_of(CHANNEL, TOKEN, x, weight), x, torch.randn(outs))
    variant = variant_of(CHANNEL, TOKEN, torch.randn(2, 40), torch.randn(50, 40)).to(DEVICE)
    ScaledMmBackend().prepare(variant)
    assert ScaledMmBackend().linear(variant, torch.empty(2, 0, 40, device=DEVICE), None).shape == (2, 0, 50)


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layernorm_modulation_activation_gate_and_residual(
    dtype: torch.dtype, activation: str, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ONE_PASS", (DEVICE,) if kernel else ())
    x, weight, bias = normal(2, 3, 96).to(dtype), torch.randn(40, 96), normal(40).to(dtype)
    before = Before(1e-6, normal(2, 96), normal(2, 96))
    after = After(activation, normal(2, 40), normal(2, 3, 40).to(dtype))
    variant = variant_of(CHANNEL, TOKEN, x.cpu(), weight.to(dtype), dict(chains(96))["smooth"]).to(DEVICE)
    expected = after.apply(exact_output(variant, before.apply(x.float()), bias)[0])
    backend = ScaledMmBackend()
    backend.prepare(variant)
    (out,) = backend.products([variant], x, [bias], before, after)
    # LayerNorm's own rounding moves a few values to the next number, which is 6 % of them
    difference = (out.double() - expected).norm() / expected.norm()
    assert out.dtype == dtype and difference < 2e-3 + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", ["none", "smooth", "both"])
def test_products_of_one_input_equal_each_alone(kind: str, one_pass: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, before, chain = normal(2, 3, 96), Before(1e-6, normal(2, 96), normal(2, 96)), dict(chains(96))[kind]
    variants = [variant_of(CHANNEL, TOKEN, x.cpu(), torch.randn(32, 96), chain).to(DEVICE) for _ in range(3)]
    backend, biases, calls = ScaledMmBackend(), [normal(32), None, normal(32)], []
    for variant in variants:
        backend.prepare(variant)
    alone = [backend.products([v], x, [b], before)[0] for v, b in zip(variants, biases, strict=True)]
    quantize = float8.quantize
    monkeypatch.setattr(float8, "quantize", lambda *args, **kwargs: calls.append(1) or quantize(*args, **kwargs))
    together = backend.products(variants, x, biases, before)
    assert len(calls) == (3 if kind == "both" else 1)
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


class Operators(TorchDispatchMode):
    """Names of the operators that are called meanwhile, without those that only look at memory otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_two_operators_do_all_that_stands_around_a_product(one_pass: None) -> None:
    x, weight = normal(2, 3, 96), torch.randn(40, 96)
    before, after = Before(1e-6, normal(2, 96), normal(2, 96)), After("gelu", normal(2, 40), normal(2, 3, 40))
    backend, chain = ScaledMmBackend(), dict(chains(96))["smooth"]
    variants = [variant_of(CHANNEL, TOKEN, x.cpu(), weight, chain).to(DEVICE) for _ in range(2)]
    for variant in variants:
        backend.prepare(variant)
    backend.products(variants, x, [None, None], before, after)  # what they share is known from now on
    with Operators() as seen:
        backend.products(variants, x, [None, None], before, after)
    assert seen.names == ["viditq::float8_quantize", *2 * ["viditq::float8_product"]]


def product_of(rows: int, width: int, outs: int, kinds: tuple[str, str], dtype: torch.dtype) -> Float8Product:
    """One of each side's scales; whatever stands behind it there."""
    x, weight_OC = torch.randn(rows, width), torch.randn(outs, width)
    variant = variant_of(QuantSpec(8, True, "channel", number=kinds[1]), token(kinds[0]), x, weight_OC)
    ScaledMmBackend().prepare(variant)
    assert isinstance(variant.held, Float8Weight)
    codes, scale = float8.quantize(x.to(DEVICE), variant.held.data.shape[1], module.NUMBERS[kinds[0]].dtype)
    behind = (normal(rows, outs).to(dtype), 1, normal(1, outs), normal(rows, outs).to(dtype))
    held = variant.held.moved(lambda part: part.to(DEVICE))
    return Float8Product(codes, scale, held, normal(outs).to(dtype), dtype, *behind)


@pytest.mark.parametrize("kinds", [("e4m3", "e4m3"), ("e5m2", "e4m3"), ("e4m3", "e5m2")])
def test_our_product_is_right_with_all_that_stands_behind_it(kinds: tuple[str, str]) -> None:
    product, cut = product_of(20, 168, 40, kinds, torch.float32), Tile(64, 64, 4, 2)
    assert disagreement(_by_triton(cut, product), product) <= 1
    assert disagreement(_by_triton(cut, product), product._replace(gate=product.gate * 1.05)) > 1
    alone = product._replace(bias=None, addend=None, activation=0, gate=None, residual=None)
    one = torch.ones(1, 1, device=DEVICE)
    for plain in (alone, alone._replace(scale=one, weight=alone.weight._replace(scale=one)), alone.extreme()):
        assert disagreement(_by_triton(cut, plain), plain) <= 1


def test_on_a_gpu_our_cuts_are_tried_beside_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    product = product_of(20, 96, 40, ("e4m3", "e4m3"), torch.bfloat16)
    assert product.label == "We4m3 and more behind it"
    monkeypatch.setattr(Float8Product, "device", torch.device("cuda"))
    names = [candidate.name for candidate in candidates_for(product) if candidate.why_not(product) is None]
    assert names == ["torch._scaled_mm by row", "torch._scaled_mm, scales after it", "triton 64x128"]
    monkeypatch.setattr(float8, "installed", lambda: False)
    assert candidates_for(product)[-1].why_not(product) == "it is not installed"


def test_every_cut_is_right() -> None:
    product = product_of(17, 288, 136, ("e4m3", "e4m3"), torch.float16)
    for cut in (FEW, Tile(32, 32, 4, 2), Tile(64, 128, 4, 3)):
        assert disagreement(_by_triton(cut, product), product) <= 1


def test_one_graph_a_segment_under_torch_compile(one_pass: None) -> None:
    x = normal(2, 3, 96)
    variants = [variant_of(CHANNEL, spec, x.cpu(), torch.randn(50, 96)) for spec in (TOKEN, ACTIVATIONS[1])]
    assert graphs_of_segments(layer_of(variants, ScaledMmBackend(), torch.randn(50), DEVICE), x)


def test_the_operators_describe_themselves_rightly() -> None:
    checks, x = ("test_schema", "test_faketensor"), normal(2, 3, 96)
    for scale in (None, torch.ones(2, device=DEVICE)):
        arguments = (x, 96, torch.float8_e4m3fn, -1.0, None, None, None, scale)
        torch.library.opcheck(torch.ops.viditq.float8_quantize.default, arguments, test_utils=checks)
    checks = checks[1:]  # the other one computes with its inputs, which torch does not in FP8
    product = product_of(6, 96, 40, ("e4m3", "e4m3"), torch.bfloat16)
    codes, scale, weight, bias, dtype, addend, activation, gate, residual = product
    held = (codes, scale, weight.data, weight.scale, weight.outs)
    behind = (addend, activation, gate, residual, dtype)
    ours, chosen = torch.ops.viditq.triton_float8_multiply.default, torch.ops.viditq.float8_product.default
    torch.library.opcheck(ours, (*held, bias, *behind, []), test_utils=checks)
    torch.library.opcheck(chosen, (*held, weight.width, bias, *behind), test_utils=checks)


def test_a_kernel_that_is_wrong_on_this_device_is_not_used_and_told(
    monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    assert module.exact_codes(DEVICE)
    real = float8.quantize

    def wrong(*args: Any, **kwargs: Any) -> Any:
        codes, scale = real(*args, **kwargs)
        codes.view(torch.uint8)[1, 5] += 1
        return codes, scale

    for forget in (module.exact_codes.cache_clear, module.one_pass.cache_clear):
        forget()
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO, logger="viditq"):
        patch.setattr(float8, "quantize", wrong)
        assert not module.exact_codes(DEVICE)
        patch.setattr(module, "exact_codes", lambda device: False)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        assert module.one_pass() == "our kernel disagrees with fake on this device"
        module.one_pass.cache_clear()
        patch.setattr(float8, "installed", lambda: False)
        assert "pip install triton" in str(module.one_pass())
    assert [line.startswith("inputs in FP8 are quantized in several passes of torch: ") for line in caplog.messages]
    for forget in (module.exact_codes.cache_clear, module.one_pass.cache_clear):
        forget()


@pytest.mark.skipif(DEVICE == "cuda", reason="this machine has a CUDA device")
def test_on_a_cpu_passes_of_torch_quantize(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "interpreted", lambda: False)  # then the kernels refuse a CPU
    x, variant = torch.randn(2, 40), variant_of(CHANNEL, TOKEN, torch.randn(2, 40), torch.randn(50, 40))
    ScaledMmBackend().prepare(variant)
    assert ScaledMmBackend().linear(variant, x, None).shape == (2, 50)
