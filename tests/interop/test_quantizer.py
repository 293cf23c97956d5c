"""diffusers' own from_pretrained and save_pretrained on quantized models: equal to ours to the bit, or refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoModel, PixArtTransformer2DModel
from random_pixart import CONFIG, outputs, random_model
from safetensors.torch import load_file, save_file

from viditq.errors import UserError
from viditq.export import diffusers as exporter
from viditq.fusion.install import fuse_blocks
from viditq.interop.backend import set_backend
from viditq.interop.quantizer import ViditqConfig
from viditq.quant import QuantLinear, QuantSpec, Recipe, RotateSpec, Rule, SmoothSpec, load_denoiser

W8, W4 = QuantSpec(8, granularity="channel"), QuantSpec(4, granularity="channel")
W8S, A8S = QuantSpec(8, True, "channel"), QuantSpec(8, True, "token", dynamic=True)
A8 = QuantSpec(8, granularity="token", dynamic=True)
SEGMENTS = (0, 0.5, 1)
RECIPES = {
    "asymmetric": Recipe(W8, A8),
    "symmetric": Recipe(W8S, A8S),
    "groups": Recipe(QuantSpec(4, False, "group", 16), A8),
    "weights_only": Recipe(QuantSpec(4, False, "group", 16), None),
    "activations_only": Recipe(None, A8),
    "timestep_aware": Recipe(W4, A8, SmoothSpec([0.3, 0.6], True), segments=SEGMENTS),
    "static": Recipe(W8, QuantSpec(8), segments=SEGMENTS),
    "rotated": Recipe(W4, A8, RotateSpec(3)),
    "scaled_and_rotated": Recipe(W4, A8, [SmoothSpec(0.3), RotateSpec()]),
    "low_rank": Recipe(W4, A8, SmoothSpec(0.5), low_rank=4),
    "gptq": Recipe(W4, A8, SmoothSpec(0.5), "gptq"),
    "mixed": Recipe(W8, A8, rules=[Rule("*.attn1.*", weight=W4), Rule("*.ff.net.2", keep_float=True)]),
}
Make = Callable[..., tuple[Path, Path]]


def build() -> PixArtTransformer2DModel:
    with torch.device("cpu"):
        model = random_model()
    position = model.pos_embed.pos_embed
    model = model.to("meta")
    model.pos_embed.pos_embed = position
    return model


def ours(artifact: Path) -> Any:
    model = load_denoiser(artifact, build, "auto")[0].eval()
    fuse_blocks(model)
    return model


def codes(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def assert_same_state(one: Any, other: Any) -> None:
    first, second = codes(one), codes(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_scheme_loads_to_the_bit_and_is_saved_again(
    make_part: Make, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    artifact, part = make_part(RECIPES[name], dtype)
    expected = ours(artifact)
    model = PixArtTransformer2DModel.from_pretrained(part)
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    assert_same_state(model, expected)
    assert torch.equal(outputs(model), outputs(expected))
    model.save_pretrained(tmp_path / "again")
    again = PixArtTransformer2DModel.from_pretrained(tmp_path / "again", dtype=dtype)
    assert_same_state(again, expected)
    assert torch.equal(outputs(again), outputs(expected))


def test_a_denoiser_of_which_nothing_is_quantized(make_part: Make, tmp_path: Path) -> None:
    _, part = make_part(Recipe())
    model = PixArtTransformer2DModel.from_pretrained(part)
    assert torch.equal(outputs(model), outputs(random_model()))
    model.save_pretrained(tmp_path / "again")
    assert_same_state(PixArtTransformer2DModel.from_pretrained(tmp_path / "again"), model)


@pytest.fixture(scope="module")
def part(make_part: Make) -> Path:
    return make_part(RECIPES["timestep_aware"])[1]


@pytest.fixture(scope="module")
def expected(part: Path) -> torch.Tensor:
    return outputs(PixArtTransformer2DModel.from_pretrained(part))


@pytest.mark.parametrize(
    "how",
    [{"device_map": "cpu"}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}, {"disable_mmap": True}],
    ids=str,
)
def test_ways_to_load(part: Path, expected: torch.Tensor, how: dict[str, Any]) -> None:
    for cls in (PixArtTransformer2DModel, AutoModel):
        assert torch.equal(outputs(cls.from_pretrained(str(part), **how)), expected)


def test_shards(part: Path, make_part: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    artifact = part.parent / "artifact"
    monkeypatch.setattr(exporter, "SHARD_BYTES", 20_000)
    exporter.write_part(tmp_path / "ours", {"_class_name": "PixArtTransformer2DModel", **CONFIG}, "float32", artifact)
    model = PixArtTransformer2DModel.from_pretrained(part)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        assert len([*folder.glob("*.safetensors")]) > 3
        assert_same_state(PixArtTransformer2DModel.from_pretrained(folder), model)


@pytest.mark.parametrize("name", ["timestep_aware", "low_rank", "static"])
def test_another_dtype_leaves_codes_and_scales_alone(make_part: Make, tmp_path: Path, name: str) -> None:
    _, part = make_part(RECIPES[name])
    recorded = PixArtTransformer2DModel.from_pretrained(part)
    other = PixArtTransformer2DModel.from_pretrained(part, dtype=torch.bfloat16)
    assert other.dtype == torch.bfloat16 and other.pos_embed.proj.weight.dtype == torch.bfloat16
    for key, tensor in codes(recorded).items():
        follows = ".variants." not in key or key.rsplit(".", 1)[1] in ("low_rank_up", "low_rank_down")
        assert torch.equal(codes(other)[key], tensor.bfloat16() if follows else tensor), key
    error = (outputs(other).float() - outputs(recorded)).norm() / outputs(recorded).norm()
    assert error < 0.05
    other.save_pretrained(tmp_path / "other")
    assert_same_state(PixArtTransformer2DModel.from_pretrained(tmp_path / "other"), other)


def test_a_float_model_is_quantized_as_it_is_loaded(tmp_path: Path) -> None:
    random_model().save_pretrained(tmp_path / "float")
    names = [f"transformer_blocks.0.attn{i}.to_q" for i in (1, 2)]
    config = ViditqConfig(RECIPES["symmetric"].resolve(names))
    model = PixArtTransformer2DModel.from_pretrained(tmp_path / "float", quantization_config=config)
    assert isinstance(model.transformer_blocks[0].attn1.to_q, QuantLinear)
    assert not isinstance(model.transformer_blocks[0].attn1.to_k, QuantLinear)
    model.save_pretrained(tmp_path / "quantized")
    again = PixArtTransformer2DModel.from_pretrained(tmp_path / "quantized")
    assert_same_state(again, model)
    assert torch.equal(outputs(again), outputs(model))
    needs = ViditqConfig(RECIPES["static"].resolve(names))
    with pytest.raises(UserError, match="needs calibration statistics"):
        PixArtTransformer2DModel.from_pretrained(tmp_path / "float", quantization_config=needs)


@pytest.mark.parametrize("name", ["symmetric", "scaled_and_rotated", "low_rank", "mixed"])
def test_dequantize(make_part: Make, tmp_path: Path, name: str) -> None:
    recipe = RECIPES[name]
    _, part = make_part(Recipe(recipe.weight, None, recipe.smoothing, low_rank=recipe.low_rank, rules=recipe.rules))
    model = PixArtTransformer2DModel.from_pretrained(part)
    set_backend(model, "fake")
    before = outputs(model)
    model.dequantize()
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    assert (outputs(model) - before).norm() < 1e-5 * before.norm()
    model.save_pretrained(tmp_path / "float")
    plain = PixArtTransformer2DModel.from_pretrained(tmp_path / "float")
    assert torch.equal(outputs(plain), outputs(model))


def test_what_no_float_model_holds_is_not_dequantized(part: Path, expected: torch.Tensor) -> None:
    model = PixArtTransformer2DModel.from_pretrained(part)
    with pytest.raises(UserError, match=r"attn1\.to_q has 2 weights for ranges of noise levels"):
        model.dequantize()
    assert torch.equal(outputs(model), expected)


def test_backends_are_chosen_after_loading(part: Path, expected: torch.Tensor) -> None:
    model = PixArtTransformer2DModel.from_pretrained(part)
    kept = {name: tensor.clone() for name, tensor in codes(model).items()}
    set_backend(model, "fake")
    assert model.transformer_blocks[0].attn1.to_q.backend_names == "fake"
    assert (outputs(model) - expected).norm() < 1e-3 * expected.norm()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in codes(model).items())
    set_backend(model, "auto")
    assert torch.equal(outputs(model), expected)


def test_layers_elsewhere_than_on_a_cpu_are_emulated(part: Path) -> None:
    """`meta` stands for a GPU."""
    model = PixArtTransformer2DModel.from_pretrained(part)
    assert model.transformer_blocks[0].attn1.to_q.backend_names != "fake"
    set_backend(model.to("meta"), "auto")
    assert {layer.backend_names for layer in model.modules() if isinstance(layer, QuantLinear)} == {"fake"}


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(part: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(part, tmp_path / "damaged"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], keep_note: bool = True) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    raw = file.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata=header if keep_note else {"format": "pt"})


def load(folder: Path, **how: Any) -> Any:
    return PixArtTransformer2DModel.from_pretrained(folder, **how)


SCALE = "transformer_blocks.0.attn1.to_q.variants.0.weight_scale"


def test_a_missing_tensor(damaged: Path) -> None:
    rewrite(damaged, lambda tensors: tensors.pop(SCALE))
    with pytest.raises(UserError, match=rf"{SCALE} is not as told"):
        load(damaged)


@pytest.mark.parametrize("key", [SCALE, "pos_embed.proj.bias", SCALE.replace("weight_scale", "qweight")])
def test_an_altered_tensor(damaged: Path, key: str) -> None:
    rewrite(damaged, lambda tensors: tensors[key].view(torch.uint8).view(-1)[:1].bitwise_xor_(1))
    with pytest.raises(UserError, match=rf"{key} was altered"):
        load(damaged)


def test_another_model(damaged: Path) -> None:
    values = json.loads((damaged / "config.json").read_text())
    values["num_layers"] = 2
    (damaged / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"the files do not fit PixArtTransformer2DModel.* transformer_blocks\.1"):
        load(damaged)


def test_a_file_of_another_program(damaged: Path) -> None:
    rewrite(damaged, lambda tensors: None, keep_note=False)
    with pytest.raises(UserError, match="was not written by viditq"):
        load(damaged)


@pytest.mark.parametrize("change", [{"format_version": 2}, {"bits": 3}, {"plan": {"edges": [0, 1]}}], ids=str)
def test_an_unknown_configuration(damaged: Path, change: dict[str, Any]) -> None:
    values = json.loads((damaged / "config.json").read_text())
    values["quantization_config"] |= change
    (damaged / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"format version 2|the field 'bits'|lacks the field"):
        load(damaged)


def test_layers_on_the_disk(part: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'device_map puts layers on "disk".*memory_budget'):
        load(part, device_map={"": "disk"}, offload_folder=str(tmp_path))


def test_pickled_files(part: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave out safe_serialization=False"):
        load(part).save_pretrained(tmp_path, safe_serialization=False)


def test_diffusers_own_refusals_stay(part: Path) -> None:
    model = load(part)
    for cast in (lambda: model.to(torch.bfloat16), model.half):
        with pytest.raises(ValueError, match="quantized model"):
            cast()
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        load(part, low_cpu_mem_usage=False)


# Imports --------------------------------------------------------------------------------------------------------------

FIRST = "import viditq; from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table"
LAST = "from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table; import viditq"
ITSELF = "import viditq.interop.quantizer; from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table"


# Slow: what diffusers imports by then; the watch for the import is what the first shows.
@pytest.mark.parametrize("order", [FIRST, *(pytest.param(o, marks=pytest.mark.slow) for o in (LAST, ITSELF))])
def test_either_import_comes_first(order: str) -> None:
    lines = [order, "assert table['viditq'].__name__ == 'ViditqQuantizer'"]
    subprocess.run([sys.executable, "-c", "; ".join(lines)], check=True)


def test_the_import_alone_is_cheap() -> None:
    line = "import sys, viditq; assert not {'torch', 'diffusers', 'hydra'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", line], check=True)
