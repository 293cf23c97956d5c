"""Fused blocks give what the plain blocks give, and step aside with a line where they do not know what to do."""

import copy
import logging
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from zoo import images, videos

from viditq.fusion.block import TOLERANCE, Fusion, disagreement
from viditq.fusion.install import fuse_blocks
from viditq.models.native import op
from viditq.models.native.processors import use_native
from viditq.models.stdit import STDiT
from viditq.quant import QuantSpec, Recipe, get_backend, linear_names, quantize_denoiser
from viditq.quant.execution.backends.auto import why_unavailable
from viditq.quant.execution.backends.fake import FakeBackend
from viditq.quant.execution.backends.scaled_mm import backend as scaled_mm
from viditq.quant.execution.backends.triton import float8
from viditq.quant.execution.linear import quant_linears

BLOCKS = ("attn", "ff", "mlp.", "proj_mlp", "proj_out", "temporal")
PIPELINES: dict[str, tuple[Callable[[], Any], dict[str, Any], dict[str, int]]] = {
    "pixart": (images.pixart_alpha, {"use_resolution_binning": False}, {"BasicTransformerBlock": 2}),
    "latte": (videos.latte, {"video_length": 4}, {"BasicTransformerBlock": 2}),
    "wan": (videos.wan21, {"num_frames": 5}, {"WanTransformerBlock": 2}),
    "wan_5b": (videos.wan22_5b, {"num_frames": 5}, {"WanTransformerBlock": 2}),
    "flux": (images.flux_dev, {}, {"FluxTransformerBlock": 2, "FluxSingleTransformerBlock": 2}),
}
NATIVE = pytest.param(
    "native",
    marks=pytest.mark.skipif(
        why_unavailable(get_backend("native")) is not None,
        reason=f"no native kernels here: {why_unavailable(get_backend('native'))}",
    ),
)
TRITON = pytest.param(
    "triton",
    marks=[
        pytest.mark.slow,  # under the interpreter, for which whole pipelines are too much
        pytest.mark.skipif(
            why_unavailable(get_backend("triton")) is not None or torch.cuda.is_available(),
            reason=f"no interpreted Triton kernels here: {why_unavailable(get_backend('triton'))}",
        ),
    ],
)
SCALED_MM = pytest.param(
    "scaled_mm",
    marks=pytest.mark.skipif(
        why_unavailable(get_backend("scaled_mm")) is not None,
        reason=f"no FP8 products here: {why_unavailable(get_backend('scaled_mm'))}",
    ),
)
FORMATS = {  # of weights and activations
    "scaled_mm": (
        QuantSpec(8, True, "channel", number="e4m3"),
        QuantSpec(8, True, "token", dynamic=True, number="e4m3"),
    )
}
INTEGERS = QuantSpec(8, granularity="channel"), QuantSpec(8, granularity="token", dynamic=True)
SIZE = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture
def fusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference backend as one that fuses: it does what stands around a product in plain torch."""
    monkeypatch.setattr(FakeBackend, "fuses", True)


def quantized(denoiser: nn.Module, backend: str = "fake") -> nn.Module:
    """8 bits in all Linears of blocks."""
    names = [name for name in linear_names(denoiser) if "block" in name and any(part in name for part in BLOCKS)]
    plan = Recipe(*FORMATS.get(backend, INTEGERS)).resolve(names)
    quantize_denoiser(denoiser.eval(), plan, None, backend, 1000.0)
    return denoiser


def sample(pipeline: Any, arguments: dict[str, Any]) -> Tensor:
    call = dict(SIZE, generator=torch.Generator().manual_seed(0), **arguments)
    out = pipeline("a small red circle", **call)
    return (out.images if hasattr(out, "images") else out.frames).float()


@pytest.mark.parametrize("backend", ["fake", NATIVE, SCALED_MM])
@pytest.mark.parametrize("name", PIPELINES)
def test_a_fused_pipeline_samples_the_same(name: str, backend: str, fusing: None, caplog: Any) -> None:
    torch.manual_seed(0)
    build, arguments, counts = PIPELINES[name]
    pipeline = build()
    pipeline.set_progress_bar_config(disable=True)
    quantized(pipeline.transformer, backend)
    plain = sample(pipeline, arguments)
    with caplog.at_level(logging.INFO, logger="viditq"):
        assert fuse_blocks(pipeline.transformer) == counts
        fused = sample(pipeline, arguments)
    assert "unfused" not in caplog.text
    blocks = [m for m in pipeline.transformer.modules() if hasattr(m, "fusion")]
    assert blocks and all(block.fusion.checked and block.fusion.off is None for block in blocks)
    assert disagreement(fused, plain, []) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend", ["fake", NATIVE, SCALED_MM, TRITON])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_stdit(masked: bool, dtype: torch.dtype, backend: str, fusing: None) -> None:
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("triton's interpreter truncates to bfloat16, which is 7 % of what a block adds")
    torch.manual_seed(0)
    size = 4 if backend == "triton" else 8
    model = STDiT(
        sample_size=size, num_frames=3, num_layers=2, num_attention_heads=2, attention_head_dim=32, caption_channels=16
    ).to(dtype)
    quantized(model, backend)
    call = {
        "hidden_states": torch.randn(2, 4, 3, size, size).to(dtype),
        "encoder_hidden_states": torch.randn(2, 7, 16).to(dtype),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]) if masked else None,
    }
    plain = model(**call).sample
    assert fuse_blocks(model) == {"Block": 2}
    fused = model(**call).sample
    assert model.blocks[0].fusion.checked and model.blocks[0].fusion.off is None
    assert disagreement(fused, plain, []) < TOLERANCE[dtype]


def tiny_stdit() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model = STDiT(
        sample_size=4, num_frames=3, num_layers=1, num_attention_heads=2, attention_head_dim=32, caption_channels=16
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 3, 4, 4),
        "encoder_hidden_states": torch.randn(2, 7, 16),
        "timestep": torch.tensor([500.0, 500.0]),
    }
    return model, inputs


@pytest.mark.parametrize("backend", [SCALED_MM])
def test_a_fused_block_is_one_graph(backend: str) -> None:
    model, inputs = tiny_stdit()
    quantized(model, backend)
    fuse_blocks(model)
    with torch.no_grad():
        expected = model(**inputs).sample
        graphs: list[Any] = []
        model.blocks[0].compile(backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
        assert torch.equal(model(**inputs).sample, expected)
    assert len(graphs) == 1 and model.blocks[0].fusion.off is None


@pytest.mark.parametrize("backend", [NATIVE])
def test_fused_blocks_compute_the_same_behind_a_compiler(backend: str) -> None:
    denoiser = pixart(backend)
    fuse_blocks(denoiser)
    expected = run(denoiser)
    for block in denoiser.transformer_blocks:
        block.compile(backend="aot_eager")
    assert torch.equal(run(denoiser), expected)


@pytest.mark.slow  # a few seconds more: what a GPU runs, by the interpreter, a block at a time
@pytest.mark.skipif(why_unavailable(get_backend("triton")) is not None, reason="no interpreted Triton kernels here")
def test_blocks_in_fp8_with_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    float8.load()
    monkeypatch.setattr(scaled_mm, "ONE_PASS", ("cpu",))
    model, inputs = tiny_stdit()
    quantized(model, "scaled_mm")
    plain = model(**inputs).sample
    fuse_blocks(model)
    fused = model(**inputs).sample
    assert model.blocks[0].fusion.checked and model.blocks[0].fusion.off is None
    assert disagreement(fused, plain, []) < TOLERANCE[torch.float32]
    monkeypatch.setattr(scaled_mm, "ONE_PASS", ())
    assert disagreement(model(**inputs).sample, fused, []) < TOLERANCE[torch.float32]


def pixart(backend: str = "fake") -> nn.Module:
    torch.manual_seed(0)
    return quantized(images.pixart_alpha().transformer, backend)


def run(denoiser: nn.Module) -> Tensor:
    torch.manual_seed(1)
    x, text = torch.randn(2, 4, 4, 4), torch.randn(2, 5, 16)
    with torch.no_grad():
        return denoiser(x, encoder_hidden_states=text, timestep=torch.tensor([500.0, 500.0])).sample


@pytest.mark.parametrize("backend", ["fake", NATIVE, SCALED_MM, TRITON])
def test_fused_blocks_are_copied_saved_and_named_as_before(backend: str, fusing: None) -> None:
    denoiser = pixart(backend)
    before, names = run(denoiser), list(denoiser.state_dict())
    fuse_blocks(denoiser)
    run(denoiser)
    again = copy.deepcopy(denoiser)
    assert list(denoiser.state_dict()) == names == list(again.state_dict())
    assert torch.equal(run(again), run(denoiser))
    assert disagreement(run(again), before, []) < TOLERANCE[torch.float32]
    assert isinstance(pickle.loads(pickle.dumps(again.transformer_blocks[0].fusion)), Fusion)
    for name, one in quant_linears(denoiser).items():
        mine, copied = (linear.state_dict() for linear in (one, quant_linears(again)[name]))
        assert all(torch.equal(mine[key], copied[key]) for key in mine)


@pytest.mark.skipif(op.missing() is not None, reason=f"needs {op.missing()}")
@pytest.mark.parametrize("backend", ["fake", NATIVE, SCALED_MM, TRITON])
def test_with_our_attention_queries_in_float_stand_beside_keys_in_codes(backend: str, fusing: None) -> None:
    """It reads q, k and v in one dtype, which each product writes them in, quantized or (in a segment) not."""
    torch.manual_seed(0)
    tiny = images.pixart_alpha().transformer
    wider = {"attention_head_dim": 32, "cross_attention_dim": 64}  # heads that the kernel takes
    denoiser = type(tiny).from_config({**tiny.config, **wider}).eval()
    names = [name for name in linear_names(denoiser) if "block" in name and any(part in name for part in BLOCKS)]
    plan = Recipe(*FORMATS.get(backend, INTEGERS), segments=(0.0, 0.4, 1.0)).resolve(names)
    layers = {name: (of[0], None) if name.endswith("to_q") else of for name, of in plan.layers.items()}
    quantize_denoiser(denoiser, replace(plan, layers=layers), None, backend, 1000.0)
    use_native(denoiser)
    plain = run(denoiser)
    fuse_blocks(denoiser)
    fused = run(denoiser)
    assert all(block.fusion.checked and block.fusion.off is None for block in denoiser.transformer_blocks)
    assert disagreement(fused, plain, []) < TOLERANCE[torch.float32]


def test_hooks_on_linears_see_their_inputs(fusing: None) -> None:
    """Observers and diagnosis hang hooks on the Linears, which a fused block would not call."""
    denoiser = pixart()
    plain = run(denoiser)
    fuse_blocks(denoiser)
    run(denoiser)
    seen: list[int] = []
    linear = denoiser.transformer_blocks[1].ff.net[2]
    handle = linear.register_forward_pre_hook(lambda *_: seen.append(1))
    out = run(denoiser)
    handle.remove()
    assert seen == [1]
    assert disagreement(out, plain, []) < TOLERANCE[torch.float32]
    run(denoiser)
    assert seen == [1]


def break_processor(denoiser: nn.Module) -> None:
    denoiser.transformer_blocks[0].attn1.set_processor(AttnProcessor())


def break_norm(denoiser: nn.Module) -> None:
    denoiser.transformer_blocks[0].norm_type = "layer_norm_i2vgen"


def break_mlp(denoiser: nn.Module) -> None:
    denoiser.transformer_blocks[0].ff.net[0] = nn.Sequential(denoiser.transformer_blocks[0].ff.net[0])


def break_query_norm(denoiser: nn.Module) -> None:
    denoiser.transformer_blocks[0].attn2.norm_q = nn.Identity()


def keep_float(denoiser: nn.Module) -> None:
    denoiser.transformer_blocks[0].attn1.to_k = nn.Linear(16, 16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (break_processor, "AttnProcessor is not known"),
        (break_norm, "norm_type=layer_norm_i2vgen is not known"),
        (break_mlp, "Sequential is not known"),
        (break_query_norm, "norm_q is not known"),
        (keep_float, "attn1.to_k is kept in float"),
    ],
)
def test_what_it_does_not_know_runs_plainly_and_is_told(
    change: Callable[[nn.Module], None], reason: str, fusing: None, caplog: Any
) -> None:
    denoiser = pixart()
    change(denoiser)
    other = copy.deepcopy(denoiser)
    with caplog.at_level(logging.INFO, logger="viditq"):
        fuse_blocks(denoiser)
        if change is not break_norm:  # what it says is what this block would refuse
            assert disagreement(run(denoiser), run(other), []) < TOLERANCE[torch.float32]
    assert reason in caplog.text


def test_a_block_that_computes_something_else_is_found_out(fusing: None, caplog: Any) -> None:
    """A gate that the adapter does not know of: the check against the plain block refuses it."""
    denoiser = pixart()
    fuse_blocks(denoiser)
    block = denoiser.transformer_blocks[0]
    adapter = type(block)

    class Larger(adapter):  # type: ignore[misc,valid-type]
        def fused(self, *args: Any, **kwargs: Any) -> Tensor:
            return 1.5 * adapter.fused(self, *args, **kwargs)

    block.__class__ = Larger
    with caplog.at_level(logging.INFO, logger="viditq"):
        out = run(denoiser)
    assert "differs from the plain block" in caplog.text
    assert disagreement(out, run(pixart()), []) < TOLERANCE[torch.float32]


def test_emulation_is_not_fused() -> None:
    denoiser = pixart()
    assert fuse_blocks(denoiser) == {}
    assert not hasattr(denoiser.transformer_blocks[0], "fusion")
