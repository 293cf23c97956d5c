"""`--to torchao`: equal to what torchao itself writes and computes, recorded; and loaded by it where it is installed.

tests/data/golden/torchao.safetensors was recorded with torchao 0.18 and diffusers 0.42 from RECIPE: what
`flatten_tensor_state_dict` makes of the loaded model (tensors of three layers, and all of the header), and its output.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from random_pixart import CONFIG, outputs, random_model, statistics
from safetensors import safe_open
from safetensors.torch import load_file

from viditq.errors import UserError
from viditq.export import torchao as exporter
from viditq.export.refusal import raise_refused, refusals
from viditq.export.sdnq import write_part as sdnq_part
from viditq.export.torchao import refusal, write_part
from viditq.export.vllm_omni import write_part as vllm_omni_part
from viditq.program import main
from viditq.quant import (
    LayerScheme,
    QuantPlan,
    QuantSpec,
    Recipe,
    RotateSpec,
    Rule,
    SmoothSpec,
    linear_names,
    quantize_denoiser,
    save_denoiser,
)

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "torchao.safetensors"
W8, W8S, W4S = QuantSpec(8, granularity="channel"), QuantSpec(8, True, "channel"), QuantSpec(4, True, "channel")
W4, W6G, W4G = QuantSpec(4, granularity="channel"), QuantSpec(6, True, "group", 16), QuantSpec(4, False, "group", 16)
A8, A8S = QuantSpec(8, granularity="token", dynamic=True), QuantSpec(8, True, "token", dynamic=True)
RECIPE = Recipe(W8, A8, rules=[Rule("*.attn2.*", weight=W4G), Rule("*.ff.*", weight=W8S)])
EXACT = {
    "w8a8": Recipe(W8, A8),
    "w4a8": Recipe(W4, A8),
    "groups": Recipe(W4G, A8),
    "weights_only": Recipe(W4G, None),
    "symmetric_weights_only": Recipe(W8S, None),
    "six_bits": Recipe(W6G, A8),
    "symmetric": Recipe(W8S, A8),
    "symmetric_w4": Recipe(W4S, A8),
    "full_range": Recipe(W8S, QuantSpec(8, True, "token", dynamic=True, full_range=True)),
    "smoothed": Recipe(W8S, A8, SmoothSpec(0.5)),
    "mixed": RECIPE,
}


def exported(folder: Path, recipe: Recipe, dtype: torch.dtype = torch.float32) -> tuple[Any, Path]:
    """The quantized model, and the folder that diffusers reads."""
    model = random_model(dtype)
    plan = recipe.resolve([name for name in linear_names(model) if name.startswith("transformer_blocks")])
    raise_refused("torchao", refusals(plan, refusal, ""), False)
    quantize_denoiser(model, plan, statistics(model) if plan.needs_stats else None)
    save_denoiser(folder / "artifact", model, plan, {"float_dtype": None})
    config = {"_class_name": "PixArtTransformer2DModel", **CONFIG}
    write_part(folder / "part", config, str(dtype).removeprefix("torch."), folder / "artifact")
    return model, folder / "part"


def header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        found: dict[str, str] = json.loads(file.read(length))["__metadata__"]
    return {key: json.loads(value) if key != "format" else value for key, value in found.items()}


def test_the_file_is_as_torchao_writes_it(tmp_path: Path) -> None:
    model, part = exported(tmp_path, RECIPE)
    file = part / "diffusion_pytorch_model.safetensors"
    mine, golden = load_file(file), load_file(GOLDEN)
    output = golden.pop("output")
    for name, tensor in golden.items():
        assert tensor.dtype == mine[name].dtype and torch.equal(tensor, mine[name]), name
    with safe_open(GOLDEN, "pt") as opened:
        recorded = {key: json.loads(value) for key, value in opened.metadata().items()}
    found = header(file)
    assert found.pop("format") == "pt"
    assert sorted(found.pop("tensor_names")) == sorted(recorded.pop("tensor_names"))
    for values in (found, recorded):
        for described in values.values():
            described.get("_tensor_data_names", []).sort()
    assert found == recorded
    assert (outputs(model) - output).norm() < 1e-3 * output.norm()


def test_smoothing_goes_into_the_input(tmp_path: Path) -> None:
    model, part = exported(tmp_path, EXACT["smoothed"])
    mine = load_file(part / "diffusion_pytorch_model.safetensors")
    scale = model.transformer_blocks[0].attn1.to_q.variants[0].chain[0].scale
    assert torch.equal(mine["transformer_blocks.0.attn1.to_q._weight_act_pre_scale"], 1 / scale)


@pytest.mark.parametrize("target", [write_part, sdnq_part, vllm_omni_part], ids=["torchao", "sdnq", "vllm-omni"])
def test_a_layer_that_the_plan_names_and_leaves_in_float_stays_so(tmp_path: Path, target: Any) -> None:
    model, scheme = random_model(), LayerScheme(W8S, A8S if target is not write_part else A8)
    kept = model.transformer_blocks[0].ff.net[2].weight.detach().clone()
    layers = {name: ("w8a8",) for name in linear_names(model) if ".attn1." in name}
    plan = QuantPlan((0.0, 1.0), {"w8a8": scheme}, {**layers, "transformer_blocks.0.ff.net.2": (None,)})
    quantize_denoiser(model, plan, None)
    save_denoiser(tmp_path / "artifact", model, plan, {"float_dtype": None})
    config = {"_class_name": "PixArtTransformer2DModel", **CONFIG}
    target(tmp_path / "part", config, "float32", tmp_path / "artifact")
    mine = load_file(tmp_path / "part" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(mine["transformer_blocks.0.ff.net.2.weight"].float(), kept)
    assert not [name for name in mine if ".variants." in name]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_diffusers_with_torchao_computes_the_same(
    tmp_path: Path, name: str, dtype: torch.dtype, shard_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao", minversion="0.18")
    monkeypatch.setattr(exporter, "SHARD_BYTES", shard_bytes)
    model, part = exported(tmp_path, EXACT[name], dtype)
    assert (len([*part.glob("*.safetensors")]) > 1) == (shard_bytes < 10**9)
    theirs = PixArtTransformer2DModel.from_pretrained(str(part), dtype=dtype)
    assert type(theirs.transformer_blocks[0].attn1.to_q.weight).__name__ in ("Int8Tensor", "IntxUnpackedToInt8Tensor")
    expected = outputs(model).double()
    error = (outputs(theirs).double() - expected).norm() / expected.norm()
    flips = 1e-3 if name == "full_range" else 5e-5  # of codes of activations: there each largest value is at an edge
    assert error <= (flips if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(W8, A8S), r"activation\.symmetric=True.* asymmetric per token"),
        (Recipe(W8S, A8S), r"activation\.symmetric=True.* the same with .*=int8_token_full_range"),
        (Recipe(W8, QuantSpec(8)), r"activation\.granularity='tensor'"),
        (Recipe(W8, QuantSpec(4, granularity="token", dynamic=True)), r"activation\.bits=4"),
        (Recipe(None, A8), r"has weight=None"),
        (Recipe(W8, A8, RotateSpec()), r"transforms=\['rotate'\].*int8_channel_symmetric"),
        (Recipe(W8, A8, SmoothSpec(0.5)), r"transforms=\['smooth'\].*int8_channel_symmetric"),
        (Recipe(W8S, A8, SmoothSpec([0.3, 0.5], True), segments=(0, 0.5, 1)), r"segments=.*smoothing=static"),
        (Recipe(W8S, A8, low_rank=4), r"low_rank=4"),
        (Recipe(QuantSpec(8, granularity="tensor"), A8), r"weight\.granularity='tensor'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "recipe",
)
def test_what_torchao_cannot_hold_is_refused(recipe: Recipe, message: str) -> None:
    plan = recipe.resolve(["x"])
    found = refusals(plan, refusal, "quant/smoothing=static and dynamic activations")
    with pytest.raises(UserError, match=rf"--to torchao cannot hold this model exactly: x has .*{message}|{message}"):
        raise_refused("torchao", found, False)


def test_the_command(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The shrunk run is timestep-aware."""
    assert main(["export", str(finished_run), "--to", "torchao", "--out", str(tmp_path / "out")]) == 2
    assert "segments=[0.0, 0.8, 1.0]" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
