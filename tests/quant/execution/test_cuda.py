"""backend=cuda: of the ways to compute a product that are right the fastest, by stand-ins."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from agreement import assert_agrees, variant_of
from torch import Tensor

from viditq.equipment import backend_for
from viditq.errors import UserError
from viditq.quant import LayerScheme, QuantSpec, Recipe, get_backend
from viditq.quant.execution.backends import CudaBackend, TritonBackend, Unavailable, auto
from viditq.quant.execution.backends.auto import why_unavailable
from viditq.quant.execution.backends.cuda import backend as module
from viditq.quant.execution.backends.cuda import candidates
from viditq.quant.execution.backends.cuda import choice as trials
from viditq.quant.execution.backends.cuda.candidates import LAST, candidates_for
from viditq.quant.execution.backends.cuda.choice import Candidate, choose, disagreement, timed
from viditq.quant.execution.backends.cuda.product import Product
from viditq.quant.execution.backends.portable import exact_product
from viditq.quant.execution.backends.signed import signed_weight
from viditq.quant.execution.backends.triton.ops import Quantized
from viditq.quant.execution.backends.triton.tiles import padded_width
from viditq.quant.methods.quantizer import (
    dequantize_weight,
    fake_quantize_activation,
    quantize_activation,
    quantize_weight,
)

REASON = why_unavailable(TritonBackend())
runs = pytest.mark.skipif(REASON is not None, reason=f"no Triton kernels here: {REASON}")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SYMMETRIC = QuantSpec(8, True, "channel"), QuantSpec(8, True, "token", None, True)
ASYMMETRIC = QuantSpec(8, False, "channel"), QuantSpec(8, False, "token", None, True)
GROUPS = QuantSpec(4, False, "group", 32), QuantSpec(8, False, "token", None, True)


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    torch.manual_seed(0)
    remembered: tuple[Callable[[], None], ...] = (
        trials._choices.clear,
        auto.first_that_takes.cache_clear,
        auto._tell.cache_clear,
    )
    for forget in remembered:
        forget()
    yield
    for forget in remembered:
        forget()


def product_of(
    specs: tuple[QuantSpec, QuantSpec], rows: int = 40, outs: int = 48, width: int = 64, **around: Any
) -> tuple[Product, Tensor, Tensor]:
    """Made in plain torch; beside it the decoded rows and weight."""
    weight_spec, spec = specs
    x, weight_OC, size = torch.randn(rows, width), torch.randn(outs, width), weight_spec.group_size or width
    quantized, codes = quantize_weight(weight_OC, weight_spec), quantize_activation(x, spec, None)
    held = signed_weight(quantized, weight_spec.bits, size, padded_width(size), packed=weight_spec.bits <= 4)
    signed = (codes.codes.to(torch.int16) - 128).to(torch.int8).view(rows, -1, size).transpose(0, 1)
    padded = torch.nn.functional.pad(signed, (0, padded_width(size) - size)).contiguous()
    zero = (codes.zero_point - 128).to(torch.int32)
    parts = Quantized(padded, codes.scale, zero, padded.sum(-1, dtype=torch.int32).T.contiguous(), spec.symmetric)
    product = Product(parts, held, torch.randn(outs), around.pop("dtype", torch.float32), **around)
    return product, fake_quantize_activation(x, spec, None), dequantize_weight(quantized, weight_spec)


def stand_in(name: str, run: Callable[[Product], Tensor] = LAST.run, why_not: str | None = None) -> Candidate:
    return Candidate(name, run, lambda product: why_not)


def clock_of(seconds: dict[str, float]) -> Callable[..., float]:
    """Reads the seconds of a candidate off its name, which its function has been given."""
    return lambda call, device: seconds[call.func.__name__]


def named(name: str, factor: float = 1.0) -> Candidate:
    def run(product: Product) -> Tensor:
        return LAST.run(product) * factor

    run.__name__ = name
    return Candidate(name, run)


@pytest.mark.parametrize("specs", [SYMMETRIC, ASYMMETRIC, GROUPS])
def test_the_reference_is_fake_s_product_and_what_stands_behind_it(specs: tuple[QuantSpec, QuantSpec]) -> None:
    product, rows, weight = product_of(specs, gate=torch.randn(2, 48), residual=torch.randn(40, 48), activation=1)
    expected, _ = product.exact()
    y = rows.double() @ weight.double().T + product.bias.double()
    y = torch.nn.functional.gelu(y, approximate="tanh") * product.gate.repeat_interleave(20, 0) + product.residual
    torch.testing.assert_close(expected, y, rtol=1e-5, atol=1e-5)
    assert disagreement(expected, product) < 0.1
    assert disagreement(expected * (1 + 1e-4), product) > 1
    assert disagreement(expected * 1.04, product._replace(dtype=torch.bfloat16)) > 1
    assert disagreement(torch.full_like(expected, torch.nan), product) == torch.inf


def test_the_fastest_that_is_right_is_taken_and_the_others_are_told_why_not() -> None:
    product, *_ = product_of(ASYMMETRIC)
    failing = Candidate("failing", lambda p: (_ for _ in ()).throw(RuntimeError("no kernel image\nand more")))
    there = [
        named("slow"),
        named("fast"),
        named("wrong", 1.01),
        failing,
        stand_in("absent", why_not="it is not installed"),
    ]
    choice = choose(product, there, LAST, clock_of({"slow": 2e-3, "fast": 1e-3, "wrong": 1e-6}))
    assert choice.taken.name == "fast" and choice.seconds == {"slow": 2e-3, "fast": 1e-3}
    assert choice.refused["failing"] == "it fails (RuntimeError: no kernel image)"
    assert choice.refused["absent"] == "it is not installed"
    assert "disagrees with fake" in choice.refused["wrong"]
    assert str(choice).startswith("fast (fast 1.000 ms, slow 2.000 ms; not wrong: it disagrees with fake (")


def test_without_any_that_is_right_it_is_emulated() -> None:
    product, rows, weight = product_of(GROUPS)
    choice = choose(product, [named("wrong", 0.5)], LAST, clock_of({}))
    assert choice.taken is LAST and str(choice).startswith("emulation (not timed; not wrong: ")
    torch.testing.assert_close(LAST.run(product), rows @ weight.T + product.bias)


def test_sums_that_saturate_are_found_by_extreme_codes() -> None:
    """As a library adds up pairs of products in 16 bits: random codes do not show it."""
    product, *_ = product_of(SYMMETRIC)

    def saturating(p: Product) -> Tensor:
        sums = (p.x.codes[0].double() @ p.weight.data[0].double().T).clamp(-(2**19), 2**19 - 1)
        y = sums.float() * (p.x.scale * p.weight.scale)
        return p.finished(y if p.bias is None else y + p.bias)

    assert disagreement(saturating(product), product) <= 1
    choice = choose(product, [Candidate("saturating", saturating)], LAST, clock_of({}))
    assert "disagrees" in choice.refused["saturating"]


def test_a_candidate_in_want_of_memory_is_left_out_and_ends_the_run_where_it_was_the_only_one() -> None:
    """torch._int_mm takes several passes over an int32 output: what does not fit that may well fit a kernel."""

    def run(product: Product) -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    product, large = product_of(SYMMETRIC)[0], Candidate("large", run)
    choice = choose(product, [large, named("small")], LAST, clock_of({"small": 1.0}))
    assert choice.taken.name == "small" and choice.refused == {"large": "it takes more memory than is free"}
    with pytest.raises(torch.cuda.OutOfMemoryError):
        choose(product, [large, named("wrong", 0.5)], LAST, clock_of({}))


def test_a_trial_and_what_it_took_run_with_their_device_as_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events are recorded on the current device: those of another one would time nothing."""
    now: list[str] = ["cuda:0"]
    seen: list[tuple[str, str]] = []

    class Current:
        def __init__(self, device: torch.device) -> None:
            self.device = str(device)

        def __enter__(self) -> None:
            now.append(self.device)

        def __exit__(self, *_: object) -> None:
            now.pop()

    def run(product: Product) -> Tensor:
        seen.append(("run", now[-1]))
        return LAST.run(product)

    def clock(call: Callable[[], object], device: torch.device) -> float:
        call()
        seen.append(("clock", now[-1]))
        return 1.0

    product = product_of(SYMMETRIC)[0]
    monkeypatch.setattr(Product, "device", torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(trials, "timed", clock)
    monkeypatch.setattr(module, "candidates_for", lambda product: [Candidate("one", run)])
    x, weight = product.x, product.weight
    module._product(*x, *weight[:4], weight.size, product.bias, None, 0, None, None, product.dtype)
    assert {device for _, device in seen} == {"cuda:1"} and [kind for kind, _ in seen].count("clock") == 1
    assert seen[-1] == ("run", "cuda:1") and now == ["cuda:0"]


@pytest.mark.skipif(not exact_product("cpu"), reason="torch._int_mm is not exact on this machine")
@pytest.mark.parametrize("specs", [SYMMETRIC, ASYMMETRIC])
def test_torch_s_product_is_right(specs: tuple[QuantSpec, QuantSpec]) -> None:
    product, *_ = product_of(specs, gate=torch.randn(2, 48), residual=torch.randn(40, 48), activation=3)
    (candidate,) = (one for one in candidates_for(product) if one.name == "torch._int_mm")
    assert candidate.why_not(product) is None
    assert disagreement(candidate.run(product), product) <= 1


@pytest.mark.parametrize(
    ("specs", "around", "reasons"),
    [
        (SYMMETRIC, {}, {"sglang-kernel": "it answers in half precision only"}),
        (SYMMETRIC, {"dtype": torch.bfloat16}, {"vllm": "it runs on CUDA devices only"}),
        (SYMMETRIC, {"rows": 16}, {"torch._int_mm": "fewer than 17 rows"}),
        (SYMMETRIC, {"outs": 50}, {"torch._int_mm": "50 outputs are no multiple of 8"}),
        (SYMMETRIC, {"outs": 56, "dtype": torch.bfloat16}, {"sglang-kernel": "56 outputs are no multiple of 16"}),
        (ASYMMETRIC, {}, {"vllm": "it takes no zero points, groups or packed weights"}),
        (GROUPS, {}, {"torch._int_mm": "weights are packed"}),
    ],
)
def test_what_keeps_a_library_from_a_product(specs: Any, around: dict[str, Any], reasons: dict[str, str]) -> None:
    product, *_ = product_of(specs, **around)
    found = {one.name: one.why_not(product) for one in candidates_for(product)}
    assert {name: found[name] for name in reasons} == reasons
    assert {"sglang-kernel", "vllm", "torch._int_mm"} < found.keys()


@pytest.mark.parametrize("module_name", ["sgl_kernel", "vllm._custom_ops"])
def test_cutlass_is_given_what_its_packages_take(module_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their signatures: a row major, b column major, scales of rows and outputs, a type, a bias of it."""
    product, *_ = product_of(SYMMETRIC, dtype=torch.bfloat16)
    assert product.bias is not None
    product = product._replace(bias=product.bias.bfloat16().float())  # as a layer of this type has it

    def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, bias: Tensor) -> Tensor:
        assert a.stride(1) == 1 and b.stride(0) == 1 and bias.dtype == dtype
        shapes = {"sgl_kernel": ((40,), (48,))}.get(module_name, ((40, 1), (1, 48)))
        assert (scale_a.shape, scale_b.shape) == shapes
        return ((a.double() @ b.double()) * scale_a.view(-1, 1) * scale_b.view(1, -1) + bias).to(dtype)

    monkeypatch.setattr(candidates, "_function", lambda *_: scaled_mm)
    (candidate,) = (
        one for one in candidates_for(product) if one.name == {"sgl_kernel": "sglang-kernel"}.get(module_name, "vllm")
    )
    assert disagreement(candidate.run(product), product) <= 1


def test_a_call_is_timed() -> None:
    calls: list[int] = []
    assert timed(lambda: calls.append(1), torch.device("cpu")) >= 0 and len(calls) == 7


def test_on_a_gpu_what_is_timed_waits_in_its_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the time of a small product would be that of Python launching it."""
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("event")

        def elapsed_time(self, end: object) -> float:
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("wait"))
    assert timed(lambda: done.append("call"), torch.device("cuda:0")) == 3e-3
    assert done == ["call", "call", "sleep", *5 * ["event", "call", "event"], "wait"]


@runs
@pytest.mark.parametrize("specs", [SYMMETRIC, ASYMMETRIC, GROUPS])
def test_a_shape_is_tried_once_and_told(specs: tuple[QuantSpec, QuantSpec], caplog: Any) -> None:
    x, weight = torch.randn(2, 10, 96), torch.randn(48, 96)
    with caplog.at_level(logging.INFO, logger="viditq"):
        for _ in range(2):
            assert_agrees(CudaBackend(), variant_of(*specs, x, weight), x, torch.randn(48))
    (line,) = caplog.messages
    assert line.startswith("20 rows, 96 to 48 features, W") and "not vllm: it " in line


@runs
def test_the_choice_is_inside_one_operator(caplog: Any) -> None:
    x, backend = torch.randn(20, 96).to(DEVICE), CudaBackend()
    variant = variant_of(*SYMMETRIC, x.cpu(), torch.randn(48, 96)).to(DEVICE)
    backend.prepare(variant)
    compiled = torch.compile(lambda t: backend.linear(variant, t, None), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), backend.linear(variant, x, None))


def test_layers_that_it_does_not_take_are_emulated_and_told(caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    w4 = LayerScheme(QuantSpec(4, False, "channel"), None)
    monkeypatch.setattr(TritonBackend, "check_available", lambda self: None)
    with caplog.at_level(logging.INFO, logger="viditq"):
        resolved = [
            get_backend("cuda").resolve(s).name for s in (LayerScheme(*ASYMMETRIC), w4, LayerScheme(None, None))
        ]
    assert resolved == ["cuda", "weight_only", "cuda"]
    assert caplog.messages == [
        "W8 channel, A8 token: triton",
        "W4 channel, A float: weight_only (not triton: it does not take activation; not scaled_mm: it does not take "
        "weight.number)",
    ]


def test_without_a_device_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "why_not", lambda: module.NO_DEVICE)
    with pytest.raises(Unavailable, match="backend cuda cannot run here: there is no CUDA device"):
        CudaBackend().check_available()
    monkeypatch.setattr(module, "why_not", lambda: "a Tesla T4 is too old")
    CudaBackend().check_available()


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_runs_on_a_cpu_refuse_it(name: str) -> None:
    with pytest.raises(UserError, match=f"backend={name} multiplies on a CUDA device, and this run on cpu"):
        backend_for(name, "cpu", Recipe(*ASYMMETRIC).resolve([]))


def test_auto_is_cuda_on_a_gpu_and_emulation_on_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaBackend, "check_available", lambda self: None)
    plan = Recipe(*ASYMMETRIC).resolve([])
    assert [backend_for("auto", device, plan) for device in ("cuda", "mps", "cpu")] == ["cuda", "fake", "auto"]
