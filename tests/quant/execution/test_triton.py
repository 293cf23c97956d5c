"""What the Triton kernels do around a product, their operators under torch.compile, and where they are refused."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from agreement import DTYPES, assert_agrees, chains, exact_output, graphs_of_segments, layer_of, variant_of
from torch import Tensor

from viditq.errors import UserError
from viditq.quant import QuantSpec
from viditq.quant.execution.backends import TritonBackend, Unavailable
from viditq.quant.execution.backends.auto import why_unavailable
from viditq.quant.execution.backends.triton import backend as module
from viditq.quant.execution.backends.triton import ops
from viditq.quant.execution.backends.triton.tiles import FEW, MANY, Tile, inner_block, padded_width, tile_for
from viditq.quant.execution.surroundings import ACTIVATIONS, After, Before
from viditq.quant.methods.quantizer import QuantizedWeight

REASON = why_unavailable(TritonBackend())
runs = pytest.mark.skipif(REASON is not None, reason=f"no Triton kernels here: {REASON}")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FEW_BYTES = 64  # that a thread may spill: with triton 3.9 none does, with 3.7.1 (torch 2.13's) the first cut 28
TOKEN, CHANNEL = QuantSpec(8, False, "token", None, True), QuantSpec(8, False, "channel")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def loaded() -> None:
    if REASON is None:
        ops.load()


def prepared(spec: QuantSpec, x: Tensor, weight: Tensor, chain: Any = None) -> Any:
    variant = variant_of(CHANNEL, spec, x.cpu(), weight, chain).to(DEVICE)
    TritonBackend().prepare(variant)
    return variant


def normal(*shape: int) -> Tensor:
    return torch.randn(shape).to(DEVICE)


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layernorm_modulation_activation_gate_and_residual_around_a_product(
    dtype: torch.dtype, activation: str
) -> None:
    x, weight, bias = normal(2, 3, 96).to(dtype), torch.randn(40, 96), normal(40)
    before = Before(1e-6, normal(2, 96), normal(2, 96))
    after = After(activation, normal(2, 40), normal(2, 3, 40).to(dtype))
    variant = variant_of(CHANNEL, TOKEN, x.cpu(), weight.to(dtype), dict(chains(96))["smooth"]).to(DEVICE)
    expected = after.apply(exact_output(variant, before.apply(x.float()), bias)[0])
    backend = TritonBackend()
    backend.prepare(variant)
    (out,) = backend.products([variant], x, [bias], before, after)
    # LayerNorm's own rounding flips a few codes by one, which moves an output by 1e-3 of its size at most
    difference = (out.double() - expected).norm() / expected.norm()
    assert out.dtype == dtype and difference < 3e-4 + torch.finfo(dtype).eps


@runs
@pytest.mark.parametrize("kind", ["none", "smooth", "both"])
def test_products_of_one_input_equal_each_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v: one quantized input where their chains are one; each its own where not; the same bits."""
    x, before = normal(2, 3, 96), Before(1e-6, normal(2, 96), normal(2, 96))
    chain = dict(chains(96))[kind]
    variants = [prepared(TOKEN, x, torch.randn(32, 96), chain) for _ in range(3)]
    backend, biases, calls = TritonBackend(), [normal(32), None, normal(32)], []
    alone = [backend.products([v], x, [b], before)[0] for v, b in zip(variants, biases, strict=True)]
    quantize = ops.quantize
    monkeypatch.setattr(ops, "quantize", lambda *args, **kwargs: calls.append(1) or quantize(*args, **kwargs))
    together = backend.products(variants, x, biases, before)
    assert len(calls) == (3 if kind == "both" else 1)
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


@runs
def test_every_cut_and_few_rows_give_the_same_bits() -> None:
    x, weight = normal(17, 192), torch.randn(130, 192)
    for spec in (CHANNEL, QuantSpec(4, False, "group", 64), QuantSpec(4, False, "group", 192)):
        variant = variant_of(spec, TOKEN, x.cpu(), weight).to(DEVICE)
        TritonBackend().prepare(variant)
        held = variant.held
        quantized = ops.quantize(x, held.size, padded_width(held.size), 1, 8, False)
        outs = [
            ops.multiply(quantized, held, None, torch.float32, tile=tile)
            for tile in (FEW, *MANY[:2], Tile(32, 32, 4, 2))
        ]
        assert all(torch.equal(out, outs[0]) for out in outs)
        alone = [TritonBackend().linear(variant, row, None) for row in x[:2]]
        assert torch.equal(torch.stack(alone), outs[0][:2])


def test_blocks_fit_what_they_cut() -> None:
    assert [padded_width(n) for n in (1, 32, 33, 96, 511, 513, 1152)] == [32, 32, 64, 96, 512, 576, 1152]
    assert [inner_block(n) for n in (32, 64, 96, 192, 1152, 576)] == [32, 64, 32, 64, 128, 64]
    assert tile_for(1) == FEW and tile_for(16) == FEW and tile_for(8192) == MANY[0]


@runs
def test_views_and_other_dtypes_around_a_product() -> None:
    x, weight = normal(2, 4, 96), torch.randn(96, 96)
    variant = prepared(TOKEN, x, weight)
    backend, strided = TritonBackend(), x.mT.contiguous().mT
    gate, shift = normal(2, 2, 96).bfloat16().unbind(1)
    before, after = Before(None, gate, shift), After("none", gate, strided)
    (out,) = backend.products([variant], strided, [None], before, after)
    plain = Before(None, gate.float(), shift.float()), After("none", gate.float(), x)
    assert torch.equal(out, backend.products([variant], x, [None], *plain)[0])
    assert_agrees(backend, variant_of(CHANNEL, TOKEN, x.cpu(), weight), x.cpu().double(), None)


@runs
def test_one_graph_a_segment_under_torch_compile() -> None:
    x = normal(2, 3, 96)
    variants = [
        variant_of(spec, TOKEN, x.cpu(), torch.randn(50, 96)) for spec in (CHANNEL, QuantSpec(4, False, "channel"))
    ]
    assert graphs_of_segments(layer_of(variants, TritonBackend(), torch.randn(50), DEVICE), x)


@runs
def test_the_operators_describe_themselves_rightly() -> None:
    x, checks = normal(2, 3, 96), ("test_schema", "test_faketensor")
    variant = prepared(TOKEN, x, torch.randn(50, 96))
    held = variant.held
    arguments = (x, 1, held.data.shape[-1], 1, 8, False, -1.0, None, None, None, None, None)
    torch.library.opcheck(torch.ops.viditq.triton_quantize.default, arguments, test_utils=checks)
    quantized = ops.quantize(x, 96, 96, 1, 8, False)
    for dtype in DTYPES:
        rest = (held.data, held.scale, held.zero_point, held.colsum, 96, None, None, 0, None, None, dtype, [])
        torch.library.opcheck(torch.ops.viditq.triton_multiply.default, (*quantized, *rest), test_utils=checks)


def test_machines_without_a_gpu_are_refused_with_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(interpreted: Any, match: str) -> None:
        monkeypatch.setattr(ops, "interpreted", interpreted)
        with pytest.raises(Unavailable, match=match):
            TritonBackend().check_available()

    def absent() -> bool:
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(lambda: False, "there is no CUDA device; choose another backend, or fake")
    refused(absent, "backend triton cannot run here: there is no CUDA device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refused(absent, r"the package triton is not installed \(pip install triton\)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    refused(lambda: False, "Tesla T4 has compute capability 7.5, and int8 products take 8.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert module.why_not() is None


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_kernels_that_are_wrong_on_this_device_are_refused_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.exact_product(DEVICE)
    weight = QuantizedWeight(torch.zeros(8, 64, dtype=torch.uint8), torch.ones(8, 1), None)
    for name in ("quantize", "multiply"):
        module.exact_product.cache_clear()
        real = getattr(ops, name)

        def wrong(*args: Any, real: Any = real, **kwargs: Any) -> Any:
            found = real(*args, **kwargs)
            (found.codes if hasattr(found, "codes") else found).flatten()[7].add_(1)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(ops, name, wrong)
            with pytest.raises(Unavailable, match="disagree with fake on this device"):
                TritonBackend().hold(weight, QuantSpec(8, True, "channel"), 64)
    module.exact_product.cache_clear()


@runs
@pytest.mark.parametrize("what", ["the large cut", "packed weights"])
def test_each_kind_of_matrix_instruction_is_tried_at_load(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large cuts are other instructions than small ones, on sm_90: a compiler may get either wrong alone."""
    real = ops.multiply

    def wrong(x: Any, weight: Any, *args: Any, tile: Any = None) -> Tensor:
        out = real(x, weight, *args, tile=tile)
        spoilt = tile == MANY[0] if what == "the large cut" else weight.packed
        return out + 300.0 if spoilt else out

    module.exact_product.cache_clear()
    monkeypatch.setattr(ops, "multiply", wrong)
    assert not module.exact_product(DEVICE)
    monkeypatch.undo()
    module.exact_product.cache_clear()


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_an_assembler_known_for_wrong_kernels_is_told_with_what_goes(
    monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """As torch 2.13's triton 3.7.1 has one for sm_90, beside a newer one."""

    def tools(used: str, other: str) -> None:
        pair = [SimpleNamespace(version=version, path=f"/{version}/ptxas") for version in (used, other)]
        monkeypatch.setattr(ops.load(), "assemblers", lambda arch: pair)

    assert all(tool.version and tool.path for tool in ops.load().assemblers(90))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(module, "interpreted_or_absent", lambda: False)
    tools("12.8", "13.1")
    module.tell_of_assembler.cache_clear()
    with caplog.at_level("WARNING", logger="viditq"):
        module.tell_of_assembler()
        module.tell_of_assembler()
    (line,) = caplog.messages
    assert "with ptxas 12.8, " in line and "Set TRITON_PTXAS_PATH=/13.1/ptxas (" in line
    tools("12.9", "13.0")
    assert "Set TRITON_PTXAS_PATH, a ptxas of CUDA 13.1 (" in str(module.assembler_doubt())
    tools("13.4", "13.4")
    assert module.assembler_doubt() is None
    tools("12.8", "13.1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert module.assembler_doubt() is None
    module.tell_of_assembler.cache_clear()


def test_a_model_on_the_cpu_is_told_to_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "interpreted", lambda: False)
    with pytest.raises(UserError, match=r"pipeline.to\('cuda'\)"):
        ops.launched_on(torch.zeros(1))


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_they_compile_for_gpus_to_int8_matrix_instructions() -> None:
    """Without any device; in a process of its own, as the interpreter replaces the language for all of this one."""
    script = Path(__file__).with_name("compiled_kernels.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    expected = {
        "cuda 80": "mma.sync.",
        "cuda 89": "mma.sync.",
        "cuda 90": "wgmma.mma_async.",
        "hip gfx942": "v_mfma_i32_",
    }
    for target, instruction in expected.items():
        mine = [line for line in lines if line.startswith(target)]
        assert len(mine) == 4
        assert all(
            instruction in line and ("s8.s8" in line or "_i8" in line) for line in mine if "few rows" not in line
        ), mine
    hopper = [line for line in lines if line.startswith("cuda 90: W4")]  # packed weights too are read by 16 bytes
    assert len(hopper) == 2 and all("bytes a copy: 16; " in line for line in hopper), hopper
    expected = {
        "FP8 on cuda 89: e4m3fn": "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32",
        "FP8 on cuda 90: e4m3fn": "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3",
        "FP8 on cuda 90: e5m2": "wgmma.mma_async.sync.aligned.m64n128k32.f32.e5m2.e4m3",
        "FP8 on hip gfx942: e4m3fn": "v_mfma_f32_32x32x8_f16",
    }
    found = {line.rpartition(": ")[0].partition(";")[0]: line for line in lines if line.startswith("FP8")}
    for target, instruction in expected.items():
        (line,) = (line for name, line in found.items() if name.startswith(target))
        assert instruction in line and ("div.rn.f32" in line.partition("quantizer")[2] or "hip" in target), line
    assert len(found) == len(expected)
    spilled = [line.partition(": ")[2] for line in lines if line.startswith("bytes spilled")]
    most = [max(map(int, re.findall(r"\d+", line))) for line in spilled]
    assert len(most) == 3 and max(most) <= FEW_BYTES and all("quantizer: 0" in line for line in spilled), spilled
