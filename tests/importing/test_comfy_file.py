"""ComfyUI's files: of every release there and back to the bit, as others write them, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_comfyui import MODELS, ROTATED, W8A8, artifact_of, tiny_adapter
from torch import Tensor
from zoo.saving import save

import viditq
from viditq.errors import UserError
from viditq.importing.artifact import ImportedModel
from viditq.importing.float_model import float_model
from viditq.program import main
from viditq.quant import ConvRotSpec, LayerScheme, QuantPlan, QuantSpec, Recipe, Rule
from viditq.quant.artifact import StoredTensors, read_meta, verify

W8, W4, TOKEN = QuantSpec(8, True, "channel"), QuantSpec(4, True, "channel"), QuantSpec(8, True, "token", dynamic=True)
GROUP = QuantSpec(4, False, "group", 64)
RECIPES = {
    "int8": W8A8,
    "tensor": Recipe(QuantSpec(8, True, "tensor"), TOKEN),
    "int4_as_int8": Recipe(W4, TOKEN),
    "convrot": Recipe(W8, TOKEN, ConvRotSpec()),
    "w4a8": Recipe(W4, TOKEN, ConvRotSpec(16)),
    "awq": Recipe(GROUP, None),
    "awq_symmetric": Recipe(QuantSpec(4, True, "group", 32), None),
    "weights": Recipe(W8, None),
    "mixed": Recipe(W8, TOKEN, ConvRotSpec(), rules=[Rule("*.to_v", weight=W4), Rule("*.ff.*", keep_float=True)]),
}
Made = Callable[[str], tuple[Path, Path]]


def state_of(artifact: Path) -> dict[str, Tensor]:
    return StoredTensors(artifact, read_meta(artifact)).run_state()


def plan_of(artifact: Path) -> QuantPlan:
    return QuantPlan.from_json((artifact / "plan.json").read_text())


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


# Slow: the second of the same names of a release.
SECOND = ("pixart_sigma", "wan2.1_1.3b", "sd3.5_medium")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SECOND)) for n in MODELS])
def test_there_and_back_of_every_release(name: str, tmp_path: Path) -> None:
    save(MODELS[name][0], tmp_path / "model")
    settings = [f"model.path='{tmp_path}/model'"]
    settings += ["model.num_frames=5"] if name.startswith(("wan", "hunyuan")) else []
    adapter = float_model(name, settings)
    recipe = W8A8 if name.startswith(("wan", "z_")) else ROTATED
    artifact = artifact_of(adapter, recipe, tmp_path / "quantized")
    assert main(["export", str(artifact), "--to", "comfyui", "--out", f"{tmp_path}/out.safetensors"]) == 0
    parts = adapter.denoiser_names
    files = [f"{tmp_path}/out{f'.{part}' if len(parts) > 1 else ''}.safetensors" for part in parts]
    words = ["import", *files, "--model", name, "--out", f"{tmp_path}/back"]
    assert main([*words, *(word for setting in settings for word in ("--set", setting))]) == 0
    assert_equal(state_of(artifact), state_of(tmp_path / "back"))
    assert plan_of(artifact).layers.keys() == plan_of(tmp_path / "back").layers.keys()
    verify(tmp_path / "back")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Name of a recipe -> an artifact of tiny_image, and its file; made once, only to be read."""
    done: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            artifact = artifact_of(tiny_adapter(), RECIPES[name], folder / "quantized")
            assert main(["export", str(artifact), "--to", "comfyui", "--out", str(folder / "out.safetensors")]) == 0
            done[name] = artifact, folder / "out.safetensors"
        return done[name]

    return make


def imported(file: Path, out: Path) -> Path:
    ImportedModel(tiny_adapter(), [file]).write(out)
    return out


def samples(artifact: Path, backend: str) -> Tensor:
    pipeline = viditq.load_quantized(artifact, backend=backend)
    generator = torch.Generator().manual_seed(0)
    images: Tensor = pipeline("a red circle", generator=generator, output_type="pt", num_inference_steps=2).images
    return images


# Slow: formats whose tensors the tests above compare; what is special about their samples, the three have.
SAMPLED = ("int8", "w4a8", "mixed")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in SAMPLED)) for n in RECIPES])
def test_samples_are_those_of_the_artifact(name: str, made: Made, tmp_path: Path) -> None:
    artifact, file = made(name)
    back = imported(file, tmp_path / "back")
    assert torch.equal(samples(artifact, "fake"), samples(back, "fake"))
    if name in ("int8", "w4a8"):
        assert torch.equal(samples(artifact, "portable"), samples(back, "portable"))
    if name in ("int8", "convrot", "weights"):
        assert_equal(state_of(artifact), state_of(back))
    if name == "w4a8":
        assert all(scheme.weight == W4 for scheme in plan_of(back).schemes.values())


def test_the_command_writes_an_artifact_that_goes_on(made: Made, tmp_path: Path, capsys: Any) -> None:
    _, file = made("convrot")
    words = ["import", str(file), "--model", "tiny_image", "--out", f"{tmp_path}/back"]
    assert main(words) == 0
    assert "of comfyui: W8 channel symmetric, A8 token symmetric, convrot: 40 layers" in capsys.readouterr().out
    before = (tmp_path / "back" / "meta.json").stat()
    assert main(words) == 0
    assert (tmp_path / "back" / "meta.json").stat().st_mtime_ns == before.st_mtime_ns
    card = (tmp_path / "back" / "README.md").read_text()
    assert "quantized elsewhere (comfyui: out.safetensors) and imported" in card and "viditq import" in card
    assert main(["export", f"{tmp_path}/back", "--to", "comfyui", "--out", f"{tmp_path}/again.safetensors"]) == 0
    assert_equal(load_file(file), load_file(tmp_path / "again.safetensors"))
    assert main(["import", str(made("int8")[1]), *words[2:]]) == 2
    assert "is no import of this file" in capsys.readouterr().err


def test_the_model_may_be_a_folder_with_guessed_settings(made: Made, tmp_path: Path) -> None:
    artifact, file = made("int8")
    settings = ["--set", "model.dtype=float32"]
    assert main(["import", str(file), "--model", "shipped:tiny_image", *settings, "--out", f"{tmp_path}/back"]) == 0
    assert_equal(state_of(artifact), state_of(tmp_path / "back"))


def rewritten(file: Path, out: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """The same file with other tensors and markers; change is given them, and those of the header."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors, told = load_file(file), json.loads(metadata["_quantization_metadata"])
    change(tensors, told["layers"])
    save_file(tensors, out, metadata={"_quantization_metadata": json.dumps(told)})
    return out


LAYER = "blocks.1.attn.qkv"


def prefixed(tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
    for name in [*tensors]:
        tensors[f"model.diffusion_model.{name}"] = tensors.pop(name)
    tensors["first_stage_model.decoder.weight"] = torch.ones(2)
    told.clear()


def header_alone(tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
    for name in [n for n in tensors if n.endswith(".comfy_quant")]:
        del tensors[name]


def flat_scales(tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
    for name in [n for n in tensors if n.endswith(".weight_scale")]:
        tensors[name] = tensors[name].flatten()


@pytest.mark.parametrize("change", [prefixed, header_alone, flat_scales])
def test_other_ways_of_writing_the_same(change: Any, made: Made, tmp_path: Path) -> None:
    artifact, file = made("convrot")
    model = ImportedModel(tiny_adapter(), [rewritten(file, tmp_path / "x.safetensors", change)])
    assert ("first_stage_model.decoder.weight" in model.told()) == (change is prefixed)
    model.write(tmp_path / "back")
    assert_equal(state_of(artifact), state_of(tmp_path / "back"))


def test_one_scale_for_a_whole_tensor(made: Made, tmp_path: Path) -> None:
    """q, k and v joined under one scale: each has it."""

    def change(tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
        tensors[f"{LAYER}.weight_scale"] = torch.tensor(0.01, dtype=torch.bfloat16)

    artifact, file = made("int8")
    back = imported(rewritten(file, tmp_path / "x.safetensors", change), tmp_path / "back")
    state, plan = state_of(back), plan_of(back)
    for part in ("to_q", "to_k", "to_v"):
        layer = f"transformer_blocks.1.attn1.{part}"
        assert state[f"{layer}.variants.0.weight_scale"].tolist() == [[torch.tensor(0.01).bfloat16().item()]]
        assert torch.equal(state[f"{layer}.variants.0.qweight"], state_of(artifact)[f"{layer}.variants.0.qweight"])
        assert plan.schemes[plan.layers[layer][0] or ""] == LayerScheme(QuantSpec(8, True, "tensor"), TOKEN)
    assert samples(back, "portable").isfinite().all()


def test_group_scales_and_codebooks_become_the_integers_that_are_multiplied(made: Made, tmp_path: Path) -> None:
    file = made("w4a8")[1]
    generator = torch.Generator().manual_seed(0)
    layer, mine = "blocks.1.mlp.fc1", "transformer_blocks.1.ff.net.0.proj.variants.0"
    codebook = torch.linspace(-1, 0.9, 16) ** 3

    def change(tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
        s_rel = tensors[f"{layer}.weight_s_rel"]
        tensors[f"{layer}.weight_s_rel"] = (torch.rand(s_rel.shape, generator=generator) * 400).to(s_rel.dtype)
        tensors[f"{layer}.weight_codebook"] = codebook

    changed = rewritten(file, tmp_path / "x.safetensors", change)
    state, tensors = state_of(imported(changed, tmp_path / "back")), load_file(changed)
    packed, s_rel = tensors[f"{layer}.weight"].view(torch.uint8), tensors[f"{layer}.weight_s_rel"].float()
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(1).long()
    integers = (codebook[codes] * s_rel.repeat_interleave(16, 1)).round().clamp(-127, 127)
    assert int(integers.abs().amax()) == 127
    assert torch.equal(state[f"{mine}.qweight"].int() - 128, integers.int())
    assert torch.equal(state[f"{mine}.weight_scale"].flatten(), tensors[f"{layer}.weight_s_channel"])


def marked(**values: Any) -> Callable[..., None]:
    """A change of one layer's marker, in both places."""

    def change(tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
        told[LAYER] = {**told[LAYER], **values}
        text = json.dumps(told[LAYER]).encode()
        tensors[f"{LAYER}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)

    return change


def without(name: str) -> Callable[..., None]:
    return lambda tensors, told: tensors.__delitem__(name)


def with_tensor(name: str, tensor: Tensor) -> Callable[..., None]:
    return lambda tensors, told: tensors.update({name: tensor})


def unmarked(tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
    header_alone(tensors, told)
    told.clear()


def all_float8(tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
    unmarked(tensors, told)
    for name in [n for n in tensors if tensors[n].dtype == torch.int8]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)


REFUSED: dict[str, tuple[Callable[..., None], str]] = {
    "fp8": (marked(format="float8_e4m3fn"), f"{LAYER} is in the format float8_e4m3fn: 8-bit floating point.*Imported"),
    "nvfp4": (marked(format="nvfp4"), "nvfp4: 4-bit floating point"),
    "unknown": (marked(format="int8_tensorwis"), "'int8_tensorwis', which is not known; close names: int8_tensorwise"),
    "field": (marked(hadamard=True), f"{LAYER} has hadamard=True in the file"),
    "group": (marked(convrot=True, convrot_groupsize=4), "convrot_groupsize=4 .* is one of 16, 64, 256"),
    "flag": (marked(convrot="yes"), "convrot='yes'"),
    "no scale": (without(f"{LAYER}.weight_scale"), f"lacks {LAYER}.weight_scale"),
    "no weight": (without(f"{LAYER}.weight"), f"marks {LAYER} as quantized and has no"),
    "no bias": (without(f"{LAYER}.bias"), f"has no {LAYER}.bias"),
    "scale": (with_tensor(f"{LAYER}.weight_scale", torch.ones(5, 1)), r"weight_scale has the shape \[5, 1\]"),
    "codes": (with_tensor(f"{LAYER}.weight", torch.ones(3, 3, dtype=torch.int8)), r"\[3, 3\] in the file; this"),
    "float codes": (
        with_tensor(f"{LAYER}.weight", torch.ones(288, 96)),
        "weight='float32' .* int8_tensorwise has int8",
    ),
    "beside": (with_tensor(f"{LAYER}.input_scale", torch.ones(1)), f"{LAYER}.input_scale lies beside codes"),
    "more": (with_tensor("blocks.40.x.weight", torch.ones(1)), "has blocks.40.x.weight .* which the model has not"),
    "raw": (unmarked, "holds int8 tensors that nothing says the format of"),
    "float8": (all_float8, "holds 8-bit floating-point weights"),
    "nan": (with_tensor(f"{LAYER}.weight_scale", torch.full((1,), torch.nan)), "weight_scale of .* contains NaN"),
    "nan bias": (with_tensor(f"{LAYER}.bias", torch.full((576,), torch.nan)), "the bias of .* contains NaN"),
    "float shape": (with_tensor("x_embedder.proj.bias", torch.ones(3)), r"pos_embed.proj.bias has the shape \[3\]"),
    "float kind": (
        with_tensor("x_embedder.proj.bias", torch.ones(96, dtype=torch.int8)),
        "pos_embed.proj.bias is int8 in the file and is not marked",
    ),
    "no marker": (lambda tensors, told: told.update({LAYER: ["int8"]}), f"{LAYER} says is .*where a mapping is needed"),
    "no json": (with_tensor(f"{LAYER}.comfy_quant", torch.ones(3, dtype=torch.uint8)), "comfy_quant says is no JSON"),
    "odd name": (marked(format=["int8"]), "is in the format .* which is not known"),
    "two words": (
        lambda tensors, told: told.update({LAYER: {"format": "int8_tensorwise", "convrot": True}}),
        f"says two things of {LAYER}",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_exactly_ours_is_refused(kind: str, made: Made, tmp_path: Path) -> None:
    change, message = REFUSED[kind]
    file = rewritten(made("int8")[1], tmp_path / "x.safetensors", change)
    with pytest.raises(UserError, match=message):
        imported(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_zeros_that_are_no_multiples_of_the_scale_are_refused(made: Made, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
        tensors[f"{LAYER}.weight_zeros"] += 1e-3

    file = rewritten(made("awq")[1], tmp_path / "x.safetensors", change)
    with pytest.raises(UserError, match=f"{LAYER} has weight_zeros=.* whole numbers z"):
        imported(file, tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.safetensors", "--model", "tiny_image"], "does not exist"),
        (["FILE", "--model", "tiny_imag"], "close names: tiny_image"),
        (["FILE", "--model", "tiny_video"], "the file is no LatteTransformer3DModel"),
        (["FILE", "FILE", "--model", "tiny_image"], "has 1 denoisers .transformer., and 2 files"),
        (["FILE", "--model", "tiny_image", "--set", "model.dtyp=float32"], "dtyp"),
        (["HERE", "--model", "tiny_image"], "holds .*, which an import does not change"),
        (["README", "--model", "tiny_image"], "is no safetensors file"),
        (["ARTIFACT", "--model", "tiny_image"], "is an artifact of viditq already"),
        (["EMPTY", "--model", "tiny_image"], "is no denoiser's folder"),
        (["CUT", "--model", "tiny_image"], "is truncated or no safetensors file"),
        (["SHORT", "--model", "tiny_image"], "is truncated or no safetensors file"),
        (["FILE", "--model", "tiny_image", "--out", "."], "--out . has no name of its own"),
        (["FILE", "--model", "tiny_image", "--out", "USED"], "used.partial is where viditq would write"),
    ],
)
def test_wrong_words_have_their_message(
    words: list[str], message: str, made: Made, tmp_path: Path, capsys: Any
) -> None:
    artifact, file = made("int8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "x.txt").write_text("")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-9])
    places = {"FILE": file, "HERE": tmp_path / "out", "README": tmp_path / "x.txt", "ARTIFACT": artifact}
    (tmp_path / "short.safetensors").write_bytes(b"abc")
    (tmp_path / "used.partial").mkdir()
    (tmp_path / "used.partial" / "notes.txt").write_text("mine")
    places |= {"EMPTY": tmp_path / "empty", "CUT": tmp_path / "cut.safetensors"}
    places |= {"SHORT": tmp_path / "short.safetensors", "USED": tmp_path / "used"}
    assert main(["import", "--out", str(tmp_path / "out"), *(str(places.get(word, word)) for word in words)]) == 2
    assert (tmp_path / "used.partial" / "notes.txt").read_text() == "mine"
    assert re.search(message, capsys.readouterr().err)
    assert not [*(tmp_path / "out").iterdir()]


def test_a_file_is_loaded_without_an_artifact(made: Made) -> None:
    artifact, file = made("convrot")
    pipeline = viditq.load_quantized(file, backend="fake", model="tiny_image")
    generator = torch.Generator().manual_seed(0)
    images = pipeline("a red circle", generator=generator, output_type="pt", num_inference_steps=2).images
    assert torch.equal(images, samples(artifact, "fake"))
    with pytest.raises(UserError, match="viditq import"):
        viditq.load_quantized(file, model="tiny_image", memory_budget="1GB")
    with pytest.raises(UserError, match="and 2 files were given"):
        viditq.load_quantized([file, file], model="tiny_image")
    with pytest.raises(UserError, match="names several places"):
        viditq.load_quantized([file, file])
