"""`--to sdnq`: the tensors read as SDNQ reads them, its recorded outputs, and the program itself where there is one.

tests/data/golden/sdnq.safetensors: what diffusers 0.42.1 with sdnq 0.2.8 computed from the folders of RECIPES. To
record it again: VIDITQ_SDNQ_PYTHON=PYTHON python tests/export/test_sdnq.py, where PYTHON has both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_pixart import CONFIG, STEPS, outputs, random_model
from safetensors.torch import load_file, save_file
from test_comfyui import artifact_of, output_of, tiny_adapter
from torch import Tensor

from viditq.errors import UserError
from viditq.export import part_files
from viditq.export.refusal import raise_refused, refusals
from viditq.export.sdnq import refusal, write_part
from viditq.export.sdnq_layout import LAYOUTS, packed, packed_shape
from viditq.program import main
from viditq.quant import (
    QuantSpec,
    Recipe,
    RotateSpec,
    Rule,
    SmoothSpec,
    linear_names,
    load_denoiser,
    quantize_denoiser,
    save_denoiser,
)
from viditq.quant.execution.model_linears import shapes_of

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "sdnq.safetensors"
PYTHON = os.environ.get("VIDITQ_SDNQ_PYTHON")
A8 = QuantSpec(8, True, "token", dynamic=True)
# whose 10 rows are fewer than the 32 from which on SDNQ quantizes activations
TEXT = [Rule("*.attn2.to_k", keep_float=True), Rule("*.attn2.to_v", keep_float=True)]


def weights(bits: int, symmetric: bool, group: int | None = None) -> QuantSpec:
    return QuantSpec(bits, symmetric, "group" if group else "channel", group)


RECIPES: dict[str, Recipe] = {
    **{f"w{bits}a8": Recipe(weights(bits, True), A8, rules=TEXT) for bits in range(2, 9)},
    **{f"w{bits}a8_asymmetric_weights": Recipe(weights(bits, False), A8, rules=TEXT) for bits in (4, 6, 8)},
    **{f"w{bits}": Recipe(weights(bits, True), None) for bits in range(2, 9)},
    **{f"w{bits}_asymmetric": Recipe(weights(bits, False), None) for bits in range(2, 9)},
    **{f"w{bits}_group16": Recipe(weights(bits, True, 16), None) for bits in (4, 6, 8)},
    **{f"w{bits}_group16_asymmetric": Recipe(weights(bits, False, 16), None) for bits in (4, 6, 8)},
    "w8_tensor": Recipe(QuantSpec(8, True), None),
    **{f"w{bits}a8_tensor": Recipe(QuantSpec(bits, True), A8, rules=TEXT) for bits in (4, 8)},
    "w4a8_rank": Recipe(weights(4, True), A8, low_rank=4, rules=TEXT),
    "w8a8_rank": Recipe(weights(8, True), A8, low_rank=4, rules=TEXT),
    "w4_rank_group16": Recipe(weights(4, False, 16), None, low_rank=4),
    "mixed": Recipe(
        weights(8, True),
        A8,
        rules=[
            *TEXT,
            Rule("*.ff.net.0.proj", weight=weights(4, True)),
            Rule("*.ff.net.2", weight=weights(6, False), low_rank=8),
            Rule("*.attn1.to_out.0", keep_float=True),
        ],
    ),
}


def part_of(folder: Path, recipe: Recipe, dtype: torch.dtype = torch.float32) -> tuple[Any, Path]:
    """The quantized model, and the folder that diffusers reads."""
    model = random_model(dtype)
    plan = recipe.resolve([name for name in linear_names(model) if name.startswith("transformer_blocks")])
    shapes = shapes_of(model)
    raise_refused("sdnq", refusals(plan, lambda scheme, layer: refusal(scheme, layer, shapes), ""), True)
    quantize_denoiser(model, plan, None)
    save_denoiser(folder / "artifact", model, plan, {"float_dtype": None})
    config = {"_class_name": "PixArtTransformer2DModel", **CONFIG}
    write_part(folder / "part", config, str(dtype).removeprefix("torch."), folder / "artifact")
    return model, folder / "part"


def settings_of(quantization: dict[str, Any], layer: str) -> dict[str, Any]:
    return quantization | quantization["modules_quant_config"].get(f"{layer}.weight", {})


def as_read(folder: Path, model: Any = None) -> Any:
    """A float model, a random one unless given, that computes with the folder's tensors."""
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    model = model or random_model()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" not in quantization["modules_to_not_convert"]:
            keys = ("weight", "scale", "zero_point", "svd_up", "svd_down")
            found = {key: tensors.pop(f"{name}.{key}", None) for key in keys}
            module.forward = linear(found, settings_of(quantization, name), module, tensors.get(f"{name}.bias"))
            tensors[f"{name}.weight"] = module.weight.detach()
    model.load_state_dict(tensors)
    return model


def linear(found: dict[str, Tensor | None], settings: dict[str, Any], module: Any, bias: Tensor | None) -> Any:
    bits, multiplied = int(settings["weights_dtype"][-1]), settings["use_quantized_matmul"]
    weight, scale = found["weight"], found["scale"]
    assert weight is not None and scale is not None and scale.dtype == torch.float32
    if bits < 8:
        codes = unpacked(weight, bits).float() - (2 ** (bits - 1) if settings["weights_dtype"][0] == "i" else 0)
        codes = codes.view(*(scale.shape[:2] if scale.ndim == 3 else scale.shape[:1]), -1)
    else:
        codes = weight.float()
    dense = codes * scale + (0 if found["zero_point"] is None else found["zero_point"])
    dense = dense.T if multiplied and bits == 8 else dense.flatten(1)
    assert dense.shape == module.weight.shape
    branch = [found[key] for key in ("svd_down", "svd_up")]

    def forward(x: Tensor) -> Tensor:
        out = F.linear(on_grid(x) if multiplied else x, dense, None if bias is None else bias.float())
        if branch[0] is not None and branch[1] is not None:
            down, up = branch if multiplied else (branch[0].T, branch[1].T)
            out = out + x @ down @ up
        return out

    return forward


def on_grid(x: Tensor) -> Tensor:
    step = x.abs().amax(-1, keepdim=True) / 127
    return (x / step).round() * step


def unpacked(stored: Tensor, bits: int) -> Tensor:
    codes, num_bytes, pieces = LAYOUTS[bits]
    blocks = stored.view(-1, num_bytes)
    out = blocks.new_zeros(len(blocks), codes)
    for code, first, count, byte, at in pieces:
        out[:, code] |= ((blocks[:, byte] >> at) & (2**count - 1)) << first
    return out.flatten()


def relative(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("bits", LAYOUTS)
def test_every_bit_has_its_place(bits: int) -> None:
    codes, num_bytes, pieces = LAYOUTS[bits]
    read = [(code, first + i) for code, first, count, _, _ in pieces for i in range(count)]
    written = [(byte, at + i) for _, _, count, byte, at in pieces for i in range(count)]
    assert sorted(read) == [(code, bit) for code in range(codes) for bit in range(bits)]
    assert sorted(written) == [(byte, bit) for byte in range(num_bytes) for bit in range(8)]
    values = torch.randint(0, 2**bits, (6, 16), dtype=torch.uint8)
    assert torch.equal(unpacked(packed(values, bits), bits).view(6, 16), values)
    assert packed(values, bits).shape == packed_shape((6, 16), bits)


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_written_and_what_sdnq_computed(name: str, tmp_path: Path) -> None:
    model, part = part_of(tmp_path, RECIPES[name])
    ours = outputs(model)
    assert relative(outputs(as_read(part)), ours) < 5e-5  # a code of an activation may flip
    # LAPACK's last places differ by CPU: of what a low-rank branch leaves of a weight some codes are others
    assert relative(load_file(GOLDEN)[name], ours) < (2e-3 if "rank" in name else 2e-4)


@pytest.mark.parametrize("name", ["w4a8_rank", "mixed", "w4_group16_asymmetric"])
def test_small_shards(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_files, "SHARD_BYTES", 10_000)
    model, part = part_of(tmp_path, RECIPES[name])
    assert len([*part.glob("*.safetensors")]) > 2
    assert relative(outputs(as_read(part)), outputs(model)) < 5e-5


def test_few_bits_take_few_bytes(tmp_path: Path) -> None:
    sizes = {}
    for name in ("w8", "w4", "w2"):
        _, part = part_of(tmp_path / name, RECIPES[name])
        tensors = load_file(part / "diffusion_pytorch_model.safetensors")
        sizes[name] = tensors["transformer_blocks.0.ff.net.2.weight"].nbytes
    assert sizes["w4"] * 2 == sizes["w8"] == sizes["w2"] * 4


def test_an_activation_s_layers_must_be_wide_enough() -> None:
    shapes = {"x": (24, 32)}
    plan = Recipe(weights(8, True), A8).resolve(["x"])
    found = refusals(plan, lambda scheme, layer: refusal(scheme, layer, shapes), "")
    with pytest.raises(UserError, match=r"x has shape=\[24, 32\].*multiples of 16.*weights only"):
        raise_refused("sdnq", found, True)
    plan = Recipe(weights(3, True), None).resolve(["x"])
    assert refusals(plan, lambda scheme, layer: refusal(scheme, layer, {"x": (3, 3)}), "")["x"].field == "shape"


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(weights(8, True), QuantSpec(8, False, "token", dynamic=True)), r"activation\.symmetric=False"),
        (Recipe(weights(8, True), replace(A8, full_range=True)), r"activation\.full_range=True"),
        (Recipe(weights(8, True), QuantSpec(4, True, "token", dynamic=True)), r"activation\.bits=4"),
        (Recipe(weights(8, True), QuantSpec(8, True)), r"activation\.granularity='tensor'"),
        (Recipe(weights(4, True, 16), A8), r"weight\.granularity='group'"),
        (Recipe(None, A8), r"weight=None"),
        (Recipe(weights(8, True), A8, SmoothSpec(0.5)), r"transforms=\['smooth'\]"),
        (Recipe(weights(4, True), None, RotateSpec()), r"transforms=\['rotate'\]"),
        (Recipe(weights(8, True), A8, SmoothSpec([0.3, 0.5], True), segments=(0, 0.5, 1)), r"segments="),
    ],
    ids=lambda value: value if isinstance(value, str) else "recipe",
)
def test_what_sdnq_cannot_hold_is_refused(recipe: Recipe, message: str) -> None:
    found = refusals(recipe.resolve(["x"]), lambda scheme, layer: refusal(scheme, layer, {"x": (32, 32)}), "w8a8_sym")
    with pytest.raises(UserError, match=rf"--to sdnq cannot hold this model exactly: x has {message}.*w8a8_sym"):
        raise_refused("sdnq", found, True)


def test_the_command_and_requantize(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tiny_adapter()
    rules = [Rule("*.attn2.*", weight=weights(4, False, 64), activation=A8), Rule("*.ff.*", weight=weights(4, True))]
    artifact = artifact_of(adapter, Recipe(weights(8, True), A8, rules=rules), tmp_path / "quantized")
    words = ["export", str(artifact), "--to", "sdnq", "--out", str(tmp_path / "out")]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "attn2.to_q has weight.granularity='group'" in told and "15 more layers" in told and "--requantize" in told
    assert main([*words, "--requantize"]) == 0
    assert "quantized again: 16 Linears" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "package sdnq" in card.split("## Loading")[1] and "| for this program | quantized again: 16 Linears" in card
    theirs = as_read(tmp_path / "out" / "transformer", adapter.denoiser_of(adapter.load()))
    ours = output_of(load_denoiser(artifact, adapter.build_denoiser)[0])
    assert 0 < relative(output_of(theirs), ours) < 0.05


def through_sdnq(part: Path, folder: Path, dtype: str = "float32") -> Tensor:
    """What the program with SDNQ makes of a folder, in a process of its own."""
    noise = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=noise)
    text = torch.randn(2, 5, 32, generator=noise)
    timesteps = torch.tensor([[step, step] for step in STEPS])
    calls, out = folder / "calls.safetensors", folder / "outputs.safetensors"
    save_file({"latents": latents.repeat(len(STEPS), 1, 1, 1, 1), "text": text, "timesteps": timesteps}, calls)
    script = Path(__file__).with_name("sdnq_run.py")
    words = [str(PYTHON), str(script), str(part), dtype, str(calls), str(out)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(words, check=True, env=environment | {"SDNQ_USE_TORCH_COMPILE": "0"})
    return load_file(out)["outputs"]


@pytest.mark.skipif(PYTHON is None, reason="VIDITQ_SDNQ_PYTHON names no Python with sdnq and diffusers")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_diffusers_with_sdnq_computes_the_same(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, part = part_of(tmp_path, RECIPES[name], dtype)
    theirs = through_sdnq(part, tmp_path, str(dtype).removeprefix("torch."))
    error = relative(theirs, outputs(model))
    print(f"{name} {dtype}: {error:.1e}")
    assert error < (2e-4 if dtype == torch.float32 else 2e-2)


def record(*names: str) -> None:
    """All, or these anew."""
    with tempfile.TemporaryDirectory() as folder:
        golden = load_file(GOLDEN) if names else {}
        for name, recipe in RECIPES.items() if not names else [(name, RECIPES[name]) for name in names]:
            place = Path(folder) / name
            place.mkdir()
            model, part = part_of(place, recipe)
            golden[name] = through_sdnq(part, place)
            print(name, f"{relative(golden[name], outputs(model)):.1e}", file=sys.stderr)
        save_file(golden, GOLDEN, metadata={"library": "sdnq 0.2.8 through diffusers 0.42.1"})


if __name__ == "__main__":
    record(*sys.argv[1:])
