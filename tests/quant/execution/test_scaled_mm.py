"""backend=scaled_mm: FP8 numbers multiplied as they are, by torch's product on a CPU and by stand-ins for a GPU's."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from agreement import assert_agrees, chains, exact_output, formats, variant_of
from torch import Tensor

from viditq.quant import LayerScheme, QuantSpec, get_backend
from viditq.quant.execution.backends import ScaledMmBackend, TritonBackend, Unavailable, auto
from viditq.quant.execution.backends.auto import why_unavailable
from viditq.quant.execution.backends.cuda import choice as trials
from viditq.quant.execution.backends.cuda.choice import Candidate, choose, disagreement
from viditq.quant.execution.backends.scaled_mm import backend as module
from viditq.quant.execution.backends.scaled_mm.product import LAST, OF_TORCH, Float8Product, Float8Weight
from viditq.quant.methods.quantizer import fake_quantize_activation, narrow_activation

REASON = why_unavailable(ScaledMmBackend())
runs = pytest.mark.skipif(REASON is not None, reason=f"no FP8 products here: {REASON}")
FORMATS = formats()
CHANNEL, TOKEN = FORMATS["fp8_e4m3_channel"], FORMATS["fp8_e4m3_token"]
TENSOR, DYNAMIC = FORMATS["fp8_e4m3_tensor"], QuantSpec(8, True, "tensor", dynamic=True, number="e4m3")
FP8_WEIGHTS = [FORMATS[name] for name in ("fp8_e4m3_channel", "fp8_e4m3_tensor", "fp8_e5m2_channel", "fp8_e5m2_tensor")]
FP8_ACTIVATIONS = [FORMATS[f"fp8_{number}_{kind}"] for number in ("e4m3", "e5m2") for kind in ("token", "tensor")]


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    torch.manual_seed(0)
    trials._choices.clear()
    yield
    trials._choices.clear()


def product_of(weight: QuantSpec = CHANNEL, activation: QuantSpec = TOKEN, **parts: Any) -> Float8Product:
    variant = variant_of(weight, activation, x := torch.randn(40, 64), torch.randn(48, 64))
    ScaledMmBackend().prepare(variant)
    codes, scale = narrow_activation(x, activation, variant.input_qparams)
    assert isinstance(variant.held, Float8Weight)
    return Float8Product(codes, scale.view(-1, 1), variant.held, torch.randn(48), parts.get("dtype", torch.float32))


@runs
@pytest.mark.parametrize("activation", [*FP8_ACTIVATIONS, DYNAMIC], ids=lambda spec: f"{spec.label}-{spec.granularity}")
@pytest.mark.parametrize("weight", FP8_WEIGHTS, ids=lambda spec: f"{spec.label}-{spec.granularity}")
def test_every_format_that_it_takes_agrees_with_fake(weight: QuantSpec, activation: QuantSpec) -> None:
    backend = ScaledMmBackend()
    if weight.number == activation.number == "e5m2":
        assert backend.unsupported_field(LayerScheme(weight, activation)) == "activation.number"
        return
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, weight_OC = torch.randn(3, 10, 96).to(dtype), torch.randn(48, 96).to(dtype)
        assert_agrees(backend, variant_of(weight, activation, x, weight_OC), x, torch.randn(48).to(dtype))


@runs
@pytest.mark.parametrize("shape", [(1, 40, 50), (17, 33, 7), (0, 32, 16), (64, 1160, 24)])
def test_any_shape_with_scales_near_the_ends(shape: tuple[int, int, int]) -> None:
    rows, width, outs = shape
    x, weight = torch.randn(rows, width) * torch.logspace(-3, 3, width), torch.randn(outs, width)
    weight *= torch.logspace(-6, 6, outs)[:, None]
    if rows == 0:
        variant = variant_of(CHANNEL, TOKEN, x, weight)
        ScaledMmBackend().prepare(variant)
        assert ScaledMmBackend().linear(variant, x, None).shape == (0, outs)
    else:
        assert_agrees(ScaledMmBackend(), variant_of(CHANNEL, TOKEN, x, weight), x, None)


@runs
def test_chains_a_branch_a_vector_and_numbers_that_are_none() -> None:
    x, weight = torch.randn(2, 5, 96), torch.randn(32, 96)
    for _, chain in chains(96):
        assert_agrees(ScaledMmBackend(), variant_of(CHANNEL, TOKEN, x, weight, chain), x, torch.randn(32))
    variant = variant_of(CHANNEL, TOKEN, x, weight, low_rank=4)
    assert_agrees(ScaledMmBackend(), variant, x, None)
    assert_agrees(ScaledMmBackend(), variant_of(CHANNEL, TOKEN, x[0, :1], weight), x[0, 0], None)
    x[0, 0, 3], x[1, 2, 5] = torch.nan, torch.inf
    out = ScaledMmBackend().linear(variant, x, None)
    expected, _ = exact_output(variant, x, None)
    assert torch.equal(out.isnan(), expected.isnan()) and out.isnan().any(-1).sum() == 2


@pytest.mark.parametrize("spec", [*FP8_ACTIVATIONS[::2], DYNAMIC], ids=lambda spec: f"{spec.label}-{spec.granularity}")
def test_codes_are_fake_s(spec: QuantSpec) -> None:
    x = torch.randn(3, 7, 33).bfloat16() * 1e3
    codes, scale = narrow_activation(x, spec, None)
    assert torch.equal(codes.float() * scale, fake_quantize_activation(x, spec, None))


@runs
def test_what_is_held_is_saved_as_it_was_and_moves_and_takes_one_byte_a_weight() -> None:
    x, weight = torch.randn(4, 40), torch.randn(50, 40)
    for spec in (CHANNEL, TENSOR):
        variant = variant_of(spec, TOKEN, x, weight)
        before = {key: value.clone() for key, value in variant.state_dict().items()}
        backend = ScaledMmBackend()
        backend.prepare(variant)
        after = variant.double().state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        held = sum(tensor.nbytes for tensor in variant.held_tensors())
        assert (
            held
            == backend.weight_bytes(variant.scheme, 50, 40, torch.float32)
            == 64 * 48 + before["weight_scale"].nbytes
        )
        variant.take_back()
        assert torch.equal(variant.state_dict()["qweight"], before["qweight"])


@pytest.mark.parametrize(
    ("weight", "activation", "field"),
    [
        (None, TOKEN, "weight"),
        (CHANNEL, None, "activation"),
        (QuantSpec(8, True, "channel"), TOKEN, "weight.number"),
        (CHANNEL, QuantSpec(8, True, "token", dynamic=True), "activation.number"),
        (FORMATS["mxfp8"], FORMATS["mxfp8_token"], "weight.granularity"),
        (CHANNEL, FORMATS["mxfp8_token"], "activation.granularity"),
        (FORMATS["nvfp4"], FORMATS["nvfp4_token"], "weight.number"),
        (CHANNEL, FORMATS["fp8_e4m3_channel"], "activation.granularity"),
    ],
)
def test_what_it_does_not_take_is_named(weight: Any, activation: Any, field: str) -> None:
    assert ScaledMmBackend().unsupported_field(LayerScheme(weight, activation)) == field


@runs
@pytest.mark.parametrize(
    ("specs", "left_out"),
    [
        ((CHANNEL, TOKEN), {"by tensor"}),
        ((TENSOR, TENSOR), {"by row", "scales after it"}),
        ((CHANNEL, TENSOR), {"by tensor"}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_way_that_may_take_a_product_is_right(specs: Any, left_out: set[str], dtype: torch.dtype) -> None:
    product = product_of(*specs, dtype=dtype)
    assert product.bias is not None
    product = product._replace(bias=product.bias.to(dtype))
    choice = choose(product, OF_TORCH, LAST, lambda call, device: 1.0)
    assert {name.removeprefix("torch._scaled_mm").strip(", ") for name in choice.refused} == left_out
    assert len(choice.seconds) == 3 - len(left_out) and disagreement(LAST.run(product), product) <= 1


@runs
def test_a_product_that_loses_digits_is_refused_and_emulated() -> None:
    """As in half precision: sums of large numbers overflow, which random ones do not show."""

    def in_half(product: Float8Product) -> Tensor:
        sums = product.codes.float() @ product.weight.data[: product.weight.outs].float().T
        y = sums.clamp(-(2.0**21), 2.0**21) * product.scale * product.weight.scale.view(1, -1)
        return y if product.bias is None else y + product.bias

    product = product_of()
    assert disagreement(in_half(product), product) <= 1
    rough = Candidate("rough", lambda p: OF_TORCH[1].run(p) * (1 + 2.0**-12))
    choice = choose(product, [Candidate("in half", in_half), rough], LAST, lambda call, device: 1.0)
    assert choice.taken is LAST and choice.refused.keys() == {"in half", "rough"}
    assert all("disagrees with fake" in reason for reason in choice.refused.values())


@runs
def test_a_shape_is_tried_once_and_told_and_one_operator(caplog: Any) -> None:
    x, backend = torch.randn(20, 96), ScaledMmBackend()
    variant = variant_of(CHANNEL, TOKEN, x, torch.randn(48, 96))
    backend.prepare(variant)
    compiled = torch.compile(lambda t: backend.linear(variant, t, None), backend="eager", fullgraph=True)
    with caplog.at_level(logging.INFO, logger="viditq"):
        assert torch.equal(compiled(x), backend.linear(variant, x, None))
    (line,) = caplog.messages
    assert (
        line.startswith("20 rows, 96 to 48 features, We4m3: torch._scaled_mm") and "not torch._scaled_mm by t" in line
    )


def test_an_older_device_is_named_and_emulation_taken(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    for cached in (auto.first_that_takes, auto._tell):
        cached.cache_clear()
    monkeypatch.setattr(TritonBackend, "check_available", lambda self: None)
    for name, value in {
        "is_available": True,
        "get_device_capability": (8, 0),
        "get_device_name": "NVIDIA A100",
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    with pytest.raises(Unavailable, match=r"NVIDIA A100 has compute capability 8\.0, and FP8 products take 8\.9"):
        ScaledMmBackend().check_available()
    with caplog.at_level(logging.INFO, logger="viditq"):
        assert get_backend("cuda").resolve(LayerScheme(CHANNEL, TOKEN)).name == "fake"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        assert get_backend("cuda").resolve(LayerScheme(TENSOR, TOKEN)).name == "scaled_mm"
    assert (
        "We4m3 channel symmetric, Ae4m3 token symmetric: fake" in caplog.messages[0]
        and "FP8 products take 8.9" in caplog.messages[0]
    )
    for cached in (auto.first_that_takes, auto._tell):
        cached.cache_clear()


def test_a_torch_whose_product_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    module._exact_on_cpu.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "_scaled_mm", lambda a, b, *rest, **kwargs: (a.float() @ b.float()).clamp(-1e3, 1e3))
    with pytest.raises(Unavailable, match="not exact"):
        ScaledMmBackend().check_available()
    module._exact_on_cpu.cache_clear()
