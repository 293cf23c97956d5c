"""Whole files of releases that diffusers converts: floats to the bit, 8-bit ones times scales, ComfyUI's integers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from original_names import original
from safetensors.torch import load_file, save_file
from test_float_file import state_of
from torch import Tensor
from zoo import families, guided, images, unlisted, videos_2026
from zoo.saving import save

from viditq.errors import UserError
from viditq.importing.artifact import ImportedModel
from viditq.importing.float_model import float_model, names_yaml
from viditq.program import main

PREFIX = "model.diffusion_model."
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "flux2_klein_4b": (families.flux2_klein, "flux2_klein"),
    "flux2_dev": (families.flux2_dev, "flux2"),
    "wan2.1_vace_1.3b": (videos_2026.wan_vace, "wan_vace"),
    "wan2.2_animate": (videos_2026.wan_animate, "wan_animate"),
    "skyreels_v2": (unlisted.skyreels_v2, "skyreels_v2"),
    "aura_flow": (images.aura_flow, "aura_flow"),
    "sana": (images.sana, "sana"),
    "hidream": (families.hidream, "hidream"),
    "qwen_image_2.1": (families.qwen_image21, "qwen_image21"),
    "krea2": (guided.krea2, "krea2"),
    "ltx2": (videos_2026.ltx2, "ltx2"),
}
QUICK = ("flux2_klein_4b", "wan2.2_animate")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in MODELS]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_a_sharded_file_becomes_the_folder(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    build, release = MODELS[name]
    save(build, tmp_path / "model")
    state = {key: value.to(dtype) for key, value in state_of(tmp_path / "model" / "transformer").items()}
    released = {f"{PREFIX}{key}": value.contiguous() for key, value in original(release, state).items()}
    weight_map = {key: f"{i % 2}.safetensors" for i, key in enumerate(released)}
    for file in sorted({*weight_map.values()}):
        save_file({key: released[key] for key, its in weight_map.items() if its == file}, tmp_path / file)
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert imported(tmp_path / "x.safetensors.index.json", name, tmp_path) == 0
    found = state_of(tmp_path / "out" / "transformer")
    assert found.keys() == state.keys() and {tensor.dtype for tensor in found.values()} == {dtype}
    assert [key for key in state if not torch.equal(found[key], state[key])] == []


def imported(file: Path, name: str, folder: Path, *settings: str) -> int:
    words = [word for setting in (f"path='{folder}/model'", *settings) for word in ("--set", f"model.{setting}")]
    return main(["import", str(file), "--model", name, *words, "--out", str(folder / "out")])


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pipeline, whose weights are multiples of 2^-9 that 8 bits hold."""
    folder = tmp_path_factory.mktemp("klein")
    save(families.flux2_klein, folder / "model")
    state = state_of(folder / "model" / "transformer")
    save_file({key: (value * 512).to(E4M3).float() / 512 for key, value in state.items()}, folder / "x.safetensors")
    return folder


def test_what_from_single_file_makes_of_it(klein: Path, tmp_path: Path) -> None:
    state = load_file(klein / "x.safetensors")
    save_file({k: v.contiguous() for k, v in original("flux2_klein", state).items()}, tmp_path / "x.safetensors")
    (tmp_path / "model").symlink_to(klein / "model")
    assert imported(tmp_path / "x.safetensors", "flux2_klein_4b", tmp_path) == 0
    theirs = diffusers.Flux2Transformer2DModel.from_single_file(
        str(tmp_path / "x.safetensors"), config=str(klein / "model"), subfolder="transformer"
    ).state_dict()
    ours = diffusers.Flux2Transformer2DModel.from_pretrained(tmp_path / "out" / "transformer").state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], value) for key, value in theirs.items())


def in_float8(state: Mapping[str, Tensor], how: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A release's file whose matrices have 8 bits, and its header."""
    tensors = {key: value.contiguous() for key, value in original("flux2_klein", state).items()}
    layers = [key.removesuffix(".weight") for key, value in tensors.items() if value.ndim == 2]
    if how == "old":  # some of these files have a scale of 1 where a weight has not 8 bits
        tensors[f"{layers.pop()}.scale_weight"] = torch.ones(())
    for layer in layers:
        weight = tensors[f"{layer}.weight"]
        tensors[f"{layer}.weight"] = (weight if how == "plain" else weight * 512).to(E5M2 if how == "plain" else E4M3)
        scale = torch.tensor(1 / 512)
        if how == "old":
            tensors |= {f"{layer}.scale_weight": scale.clone(), f"{layer}.scale_input": torch.ones(())}
        elif how == "rows":
            tensors[f"{layer}.weight_scale"] = torch.full((len(weight), 1), 1 / 512)
        elif how != "plain":
            tensors |= {f"{layer}.weight_scale": scale.reshape(1), f"{layer}.input_scale": torch.ones(())}
        if how in ("beside", "rows"):
            marker = json.dumps({"format": "float8_e4m3fn"}).encode()
            tensors[f"{layer}.comfy_quant"] = torch.frombuffer(bytearray(marker), dtype=torch.uint8)
    told = {f"{PREFIX}{layer}": {"format": "float8_e4m3fn"} for layer in layers} if how == "header" else {}
    tensors |= {"scaled_fp8": torch.zeros(0, dtype=E4M3)} if how == "old" else {}
    named = {f"{PREFIX}{key}": value for key, value in tensors.items()}
    return named, {"_quantization_metadata": json.dumps({"layers": told})} if told else {}


@pytest.mark.parametrize("how", ["old", "beside", "header", "rows", "plain"])
def test_8_bit_floating_point_times_its_scales_is_the_float_model(
    how: str, klein: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_file(klein / "x.safetensors")
    if how == "plain":  # which E5M2 holds as it is
        state = {key: value.to(E5M2).float() if value.ndim == 2 else value for key, value in state.items()}
    tensors, header = in_float8(state, how)
    save_file(tensors, tmp_path / "x.safetensors", header)
    (tmp_path / "model").symlink_to(klein / "model")
    assert imported(tmp_path / "x.safetensors", "flux2_klein_4b", tmp_path, "dtype=bfloat16") == 0
    said = "as they are, for the file has no scales of them" if how == "plain" else "times their scales"
    assert f"tensors of 8-bit floating point {said}, as bfloat16" in capsys.readouterr().out
    found = state_of(tmp_path / "out" / "transformer")
    assert found.keys() == state.keys() and all(torch.equal(found[key].float(), state[key]) for key in state)
    dtypes = [found[key].dtype for key, value in state.items() if value.ndim == 2]
    assert dtypes.count(torch.bfloat16) == len(dtypes) - (how == "old")


@pytest.mark.parametrize("kind", ["block scales", "unsaid", "no scale", "another type", "nvfp4", "rotated", "infinite"])
def test_8_bit_numbers_that_cannot_be_read(
    kind: str, klein: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, _ = in_float8(load_file(klein / "x.safetensors"), "beside")
    layer = f"{PREFIX}double_blocks.0.img_attn.qkv"
    if kind == "block scales":
        tensors[f"{layer}.weight_scale"] = torch.ones(2, 2)
    elif kind == "unsaid":
        del tensors[f"{layer}.comfy_quant"]
    elif kind == "no scale":
        del tensors[f"{layer}.weight_scale"]
    elif kind == "another type":
        tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"].float().to(E5M2)
    elif kind in ("nvfp4", "rotated"):
        told = {"format": "nvfp4"} if kind == "nvfp4" else {"format": "float8_e4m3fn", "convrot": True}
        marker = json.dumps(told).encode()
        tensors[f"{layer}.comfy_quant"] = torch.frombuffer(bytearray(marker), dtype=torch.uint8)
    else:
        tensors[f"{layer}.weight_scale"] = torch.tensor([torch.inf])
    save_file(tensors, tmp_path / "x.safetensors")
    (tmp_path / "model").symlink_to(klein / "model")
    assert imported(tmp_path / "x.safetensors", "flux2_klein_4b", tmp_path) == 2
    error = capsys.readouterr().err
    said = {
        "block scales": "weight_scale has the shape [2, 2] in the file",
        "unsaid": "nothing in the file says how they go together",
        "no scale": "lacks double_blocks.0.img_attn.qkv.weight_scale",
        "another type": "is marked as float8_e4m3fn and is float8_e5m2",
        "nvfp4": "is in the format",
        "rotated": "has convrot=True in the file, whose meaning is not known",
        "infinite": "holds no finite numbers",
    }[kind]
    assert said in error and not (tmp_path / "out").exists(), error


def test_a_checkpoint_of_a_model_is_known_by_its_name(klein: Path) -> None:
    """Not taken for an id on the hub, which looks the same."""
    own, base = (
        float_model(name, [f"model.path='{klein}/model'"]) for name in ("flux2_klein_4b", "flux2_klein_4b/base")
    )
    assert (base.name, base.num_steps, base.guidance_scale) == ("flux2_klein_4b_base", 50, 4)
    assert own.num_steps < base.num_steps and names_yaml("flux2_klein_4b/base")
    assert not names_yaml("black-forest-labs/FLUX.2-klein-4B") and not names_yaml("diffusers")
    with pytest.raises(UserError, match=r"flux2_klein_4b/bse is none .* beside its own: flux2_klein_4b/base"):
        float_model("flux2_klein_4b/bse")


def test_integers_of_a_converted_release_are_taken_apart(klein: Path, tmp_path: Path) -> None:
    state = load_file(klein / "x.safetensors")
    tensors = {key: value.contiguous() for key, value in original("flux2_klein", state).items()}
    layer = "double_blocks.0.img_attn.qkv"
    rows = len(tensors[f"{layer}.weight"]) // 3
    codes = torch.randint(-127, 128, (3 * rows, rows), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    marker = json.dumps({"format": "int8_tensorwise"}).encode()
    scale = torch.linspace(0.1, 1, 3 * rows)[:, None]
    tensors |= {f"{layer}.weight": codes, f"{layer}.weight_scale": scale}
    tensors[f"{layer}.comfy_quant"] = torch.frombuffer(bytearray(marker), dtype=torch.uint8)
    save_file(tensors, tmp_path / "x.safetensors")
    adapter = float_model("flux2_klein_4b", [f"model.path='{klein}/model'"])
    layers = ImportedModel(adapter, [tmp_path / "x.safetensors"]).layers
    assert [*layers] == [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
    for i, (name, layer_) in enumerate(layers.items()):
        made = layer_.tensors(name)
        mine = slice(i * rows, (i + 1) * rows)
        assert torch.equal(made["weight_scale"], scale[mine])
        assert torch.equal(made["qweight"].to(torch.int16) - 128, codes[mine].to(torch.int16))
