"""Whole files for ComfyUI: of every release that has one, and what reads them makes of them what we do."""

import copy
import functools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as converters
from hydra.utils import instantiate
from kitchen import kitchen_linear
from omegaconf import DictConfig
from safetensors import safe_open
from safetensors.torch import load_file
from shrunk import compose_config
from torch import Tensor, nn
from twin import comfy_linear, fields_of, float_weight, marker_of
from zoo import images, videos
from zoo.saving import save

from viditq.errors import UserError
from viditq.export.comfy_formats import refusal
from viditq.export.refusal import raise_refused, refusals
from viditq.export.releases import RELEASES, release_of
from viditq.models.adapter import ModelAdapter
from viditq.models.official_pixart import NOT_IN_PIXART, pixart_names
from viditq.program import main
from viditq.quant import (
    ConvRotSpec,
    LayerScheme,
    QuantPlan,
    QuantSpec,
    Recipe,
    Rule,
    SmoothSpec,
    linear_names,
    load_denoiser,
    quantize_denoiser,
    save_denoiser,
)
from viditq.quant.artifact import meta_sha256
from viditq.quant.execution.linear import quant_linears

Configure = Callable[..., DictConfig]
W8, W4, TOKEN = QuantSpec(8, True, "channel"), QuantSpec(4, True, "channel"), QuantSpec(8, True, "token", dynamic=True)
# model -> its builder, and what makes diffusers' names of the file's where it knows such small ones
MODELS: dict[str, tuple[Callable[[], Any], Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None]] = {
    "pixart_alpha": (images.pixart_alpha, lambda state: pixart_names(state)),
    "pixart_sigma": (images.pixart_sigma, lambda state: pixart_names(state)),
    "wan2.1_1.3b": (videos.wan21, converters.convert_wan_transformer_to_diffusers),
    "wan2.2": (videos.wan22, converters.convert_wan_transformer_to_diffusers),
    "flux_dev": (images.flux_dev, None),
    "sd3.5": (images.sd35, converters.convert_sd3_transformer_checkpoint_to_diffusers),
    "sd3.5_medium": (images.sd35_medium, converters.convert_sd3_transformer_checkpoint_to_diffusers),
    "qwen_image": (images.qwen_image, lambda state: state),
    "z_image": (images.z_image, converters.convert_z_image_transformer_checkpoint_to_diffusers),
    "hunyuan_video": (videos.hunyuan_video, None),
    "ltx_video": (videos.ltx_video, converters.convert_ltx_transformer_checkpoint_to_diffusers),
}


BITS = {"average_weight_bits": 8.0, "average_activation_bits": 8.0, "float_size_bytes": 1}
W8A8, ROTATED = Recipe(W8, TOKEN), Recipe(W8, TOKEN, ConvRotSpec(16))  # where all widths divide into groups of 16


def artifact_of(adapter: ModelAdapter, recipe: Recipe, folder: Path) -> Path:
    """Quantized as a run does it, without its stages."""
    denoiser = adapter.denoiser_of(adapter.load())
    names = linear_names(denoiser)
    floats = [name for name, role in adapter.linear_roles(names).items() if role == "float"]
    plan = recipe.with_rules([*(Rule(name, keep_float=True) for name in floats), *recipe.rules]).resolve(names)
    quantize_denoiser(denoiser, plan, None, timestep_scale=adapter.timestep_scale)
    save_denoiser(folder, denoiser, plan, {"model": adapter.to_dict(), "float_dtype": None} | BITS)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_the_model_under_the_release_s_names(
    name: str, configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, convert = MODELS[name]
    save(build, tmp_path / "model")
    frames = ["model.num_frames=5"] if name.startswith(("wan", "hunyuan")) else []
    adapter: ModelAdapter = instantiate(
        configure(f"model={name}", f"model.path='{tmp_path}/model'", "name=x", *frames).model, _convert_="all"
    )
    artifact = artifact_of(adapter, W8A8 if name.startswith(("wan", "z_")) else ROTATED, tmp_path / "quantized")
    assert main(["export", str(artifact), "--to", "comfyui", "--out", f"{tmp_path}/out.safetensors"]) == 0
    denoiser, _, _, _ = load_denoiser(artifact, adapter.build_denoiser)
    parts = dict(denoiser) if isinstance(denoiser, nn.ModuleDict) else {"": denoiser}
    written = [tmp_path / f"out.{part}.safetensors" if part else tmp_path / "out.safetensors" for part in parts]
    assert capsys.readouterr().out.splitlines()[-len(parts) :] == [*map(str, written)]
    card = (tmp_path / "out.README.md").read_text()
    assert "ComfyUI" in card.split("## Loading")[1] and "0.00 MB" not in card.split("all of this export")[1][:20]
    for file, module in zip(written, parts.values(), strict=True):
        check_file(file, module, convert)


def check_file(file: Path, denoiser: Any, convert: Any) -> None:
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        told = json.loads(opened.metadata()["_quantization_metadata"])["layers"]
    marked = {name.removesuffix(".comfy_quant") for name in tensors if name.endswith(".comfy_quant")}
    assert told == {layer: marker_of(tensors, layer) for layer in marked} and marked
    layers = quant_linears(denoiser)
    state = {n: t for n, t in denoiser.state_dict().items() if ".variants." not in n}
    weights = {f"{n}.weight": weight_of(layer) for n, layer in layers.items()}
    released = {n: t for n, t in tensors.items() if not n.endswith((".comfy_quant", ".weight_scale"))}
    for layer in marked:
        fields = fields_of(tensors, layer)
        assert fields["weight"].dtype == torch.int8 and fields["weight_scale"].shape == (len(fields["weight"]), 1)
        released[f"{layer}.weight"] = float_weight(fields, told[layer])
    wanted = {}
    for target, origin in release_of(type(denoiser).__name__).origins([*state, *weights]).items():
        rows = torch.cat([(state | weights)[part].float() for part in origin.names])
        wanted[target] = torch.cat(rows.chunk(2)[::-1]) if origin.swapped else rows
    extras = {"pos_embed", "y_embedder.y_embedding"} if "PixArt" in type(denoiser).__name__ else set()
    assert released.keys() == wanted.keys() | extras
    for target, tensor in wanted.items():
        torch.testing.assert_close(released[target].float(), tensor, rtol=1e-5, atol=1e-6)
    if convert is not None:
        back = convert({n: t for n, t in released.items() if n not in NOT_IN_PIXART or not extras})
        assert back.keys() == state.keys() | weights.keys()
        for n, tensor in (state | weights).items():
            torch.testing.assert_close(back[n].float(), tensor.float(), rtol=1e-5, atol=1e-6)


def weight_of(layer: Any) -> Tensor:
    variant = layer.variants[0]
    variant.dtype = torch.float32
    return variant.chain.weight(variant.dequantized_weight())  # a ConvRot undoes itself


def test_every_release_is_exported() -> None:
    tried = {"PixArt", "Wan", "Flux", "SD3", "QwenImage", "ZImage", "HunyuanVideo", "LTXVideo"}
    assert {name.partition("Transformer")[0] for name in RELEASES} == tried


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The artifact of tiny_image by the name of a recipe, made once."""
    made: dict[str, Path] = {}
    adapter = tiny_adapter()
    group = QuantSpec(4, False, "group", 64)
    recipes = {
        "int8": Recipe(W8, TOKEN),
        "int8_convrot": Recipe(W8, TOKEN, ConvRotSpec()),
        "int4": Recipe(W4, TOKEN),
        "int4_convrot": Recipe(W4, TOKEN, ConvRotSpec()),
        "int4_weight_only": Recipe(group, None),
        "mixed": Recipe(W8, TOKEN, ConvRotSpec(), rules=[Rule("*.to_v", weight=W4), Rule("*.ff.*", keep_float=True)]),
        "asymmetric": Recipe(QuantSpec(8, False, "channel"), QuantSpec(8, False, "token", dynamic=True)),
        "half": Recipe(W8, TOKEN, rules=[Rule("transformer_blocks.1.attn1.to_k", keep_float=True)]),
        "few": Recipe(
            W8, TOKEN, rules=[Rule("transformer_blocks.2.*", activation=QuantSpec(6, True, "token", dynamic=True))]
        ),
    }

    def make(name: str) -> Path:
        if name not in made:
            made[name] = artifact_of(adapter, recipes[name], tmp_path_factory.mktemp("artifact") / "quantized")
        return made[name]

    return make


def tiny_adapter() -> ModelAdapter:
    return instantiate(compose_config("model=tiny_image", "name=x").model, _convert_="all")


@functools.cache
def float_denoiser() -> Any:
    adapter = tiny_adapter()
    return adapter.denoiser_of(adapter.load())


@torch.no_grad()
def output_of(denoiser: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 16, 96, generator=generator)
    conditions = {"resolution": None, "aspect_ratio": None}
    out: Tensor = denoiser(latents, text, torch.tensor([500, 500]), conditions, return_dict=False)[0]
    return out


def as_read(file: Path, linear: Callable[..., Tensor]) -> Any:
    """The float denoiser with each Linear of the file computed by `linear` from the file's tensors."""
    tensors = load_file(file)
    denoiser = copy.deepcopy(float_denoiser())
    names = [name for name, _ in denoiser.named_parameters()]
    for target, origin in release_of("PixArtTransformer2DModel").origins(names).items():
        layer = target.removesuffix(".weight")
        if f"{layer}.comfy_quant" not in tensors or not target.endswith(".weight"):
            continue
        marker, fields, bias = marker_of(tensors, layer), fields_of(tensors, layer), tensors[f"{layer}.bias"].float()
        start = 0
        for part in origin.names:
            module = denoiser.get_submodule(part.removesuffix(".weight"))
            rows = slice(start, start + module.out_features)
            start = rows.stop

            def forward(x: Tensor, fields=fields, marker=marker, bias=bias, rows=rows) -> Tensor:
                out: Tensor = linear(fields, marker, x.flatten(0, -2), bias)[:, rows].unflatten(0, x.shape[:-1])
                return out

            module.forward = forward
    return denoiser


HELD = ["int8", "int8_convrot", "int4", "int4_convrot", "int4_weight_only", "mixed"]


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("recipe", HELD)
def test_the_whole_model_computes_what_ours_does(recipe: str, tiny, tmp_path: Path) -> None:
    artifact, out = tiny(recipe), tmp_path / "out.safetensors"
    assert main(["export", str(artifact), "--to", "comfyui", "--out", str(out)]) == 0
    ours = output_of(load_denoiser(artifact, tiny_adapter().build_denoiser)[0])
    assert relative(output_of(as_read(out, comfy_linear)), ours) < 1e-4


@pytest.mark.parametrize("recipe", HELD)
def test_the_whole_model_in_comfy_kitchen_s_arithmetic(recipe: str, tiny, tmp_path: Path) -> None:
    """Each layer on the inputs that the library's own layers before it make. In the end what integers give without a
    rotation is equal; else codes on an edge between two part, and what follows with them.
    """
    pytest.importorskip("comfy_kitchen")
    artifact, out = tiny(recipe), tmp_path / "out.safetensors"
    assert main(["export", str(artifact), "--to", "comfyui", "--out", str(out)]) == 0
    errors = []

    def both(fields: dict[str, Tensor], marker: dict[str, Any], x: Tensor, bias: Tensor) -> Tensor:
        theirs = kitchen_linear(fields, marker, x, bias)
        errors.append(relative(theirs, comfy_linear(fields, marker, x, bias)))
        return theirs

    theirs = output_of(as_read(out, both))
    assert len(errors) >= 24 and max(errors) < 1e-4 and sorted(errors)[len(errors) // 2] < 1e-6
    backend = "fake" if recipe == "int4_weight_only" else "portable"
    ours = output_of(load_denoiser(artifact, tiny_adapter().build_denoiser, backend)[0])
    rotated = recipe in ("int8_convrot", "int4_convrot", "mixed")
    assert relative(theirs, ours) < (relative(ours, output_of(float_denoiser())) if rotated else 1e-6)


def test_parts_of_one_tensor_may_differ_in_bits_but_not_be_float(tiny, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.safetensors"
    assert main(["export", str(tiny("mixed")), "--to", "comfyui", "--out", str(out)]) == 0
    tensors = load_file(out)
    assert tensors["blocks.0.attn.qkv.weight"].shape == (576, 192) and "blocks.0.mlp.fc1.comfy_quant" not in tensors
    assert tensors["blocks.0.attn.qkv.weight"][384:].abs().max() <= 8 < tensors["blocks.0.attn.qkv.weight"].abs().max()
    assert main(["export", str(tiny("half")), "--to", "comfyui", "--out", f"{tmp_path}/half.safetensors"]) == 2
    told = capsys.readouterr().err
    assert "transformer_blocks.1.attn1.to_k has scheme='float'" in told and "quant=w8a8_sym" in told
    assert not (tmp_path / "half.safetensors").exists()


def test_what_cannot_go_is_refused_with_its_layer_field_and_the_nearest(tiny, tmp_path: Path, capsys) -> None:
    for recipe, field in (("asymmetric", "activation.symmetric=False"), ("few", "activation.bits=6")):
        out = tmp_path / f"{recipe}.safetensors"
        assert main(["export", str(tiny(recipe)), "--to", "comfyui", "--out", str(out)]) == 2
        told = capsys.readouterr().err
        layer = "transformer_blocks.2.attn1.to_q" if recipe == "few" else "transformer_blocks.0.attn1.to_q"
        assert f"{layer} has {field}" in told and "quant=w8a8_sym" in told and "--requantize" in told
        assert not out.exists()


@pytest.mark.parametrize(("recipe", "layers"), [("asymmetric", 40), ("few", 10), ("half", 3)])
def test_requantize_converts_what_must_be_and_says_what_it_costs(recipe, layers, tiny, tmp_path, capsys) -> None:
    out = tmp_path / "out.safetensors"
    assert main(["export", str(tiny(recipe)), "--to", "comfyui", "--out", str(out), "--requantize"]) == 0
    assert f"quantized again: {layers} Linears" in capsys.readouterr().out
    card = (tmp_path / "out.README.md").read_text()
    assert f"| for this program | quantized again: {layers} Linears" in card
    with safe_open(out, "pt") as file:
        cost = json.loads(file.metadata()["viditq_requantized"])
    ours = output_of(load_denoiser(tiny(recipe), tiny_adapter().build_denoiser)[0])
    error = float((output_of(as_read(out, comfy_linear)) - ours).norm() / ours.norm())
    assert 0 < cost["output_error"] < 0.05 and 0 < cost["mean_layer_error"] < 0.06
    assert cost["output_error"] / 4 < error < 4 * cost["output_error"]


@pytest.mark.parametrize("name", ["flux_dev", "wan2.2", "pixart_sigma"])
def test_requantize_in_bfloat16_and_with_two_denoisers(name: str, tmp_path: Path, configure: Configure, capsys) -> None:
    save(MODELS[name][0], tmp_path / "model")
    overrides = ["model.height=16", "model.width=16", *(["model.num_frames=5"] if name == "wan2.2" else [])]
    cfg = configure(f"model={name}", f"model.path='{tmp_path}/model'", "name=x", *overrides)
    adapter: ModelAdapter = instantiate(cfg.model, _convert_="all")
    asymmetric = Recipe(QuantSpec(8, False, "channel"), QuantSpec(8, False, "token", dynamic=True))
    artifact = artifact_of(adapter, asymmetric, tmp_path / "quantized")
    assert main(["export", str(artifact), "--to", "comfyui", "--requantize"]) == 0
    assert "quantized again" in capsys.readouterr().out
    for file in (tmp_path / "exports").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert 0 < json.loads(opened.metadata()["viditq_requantized"])["output_error"] < 0.2


def test_what_differs_by_noise_level_does_not_go_and_what_is_alike_does(tmp_path: Path, capsys) -> None:
    adapter = tiny_adapter()
    alike = artifact_of(adapter, Recipe(W8, TOKEN, segments=(0, 0.5, 1)), tmp_path / "quantized")
    assert main(["export", str(alike), "--to", "comfyui"]) == 0
    assert (tmp_path / "exports" / "comfyui.safetensors").is_file()
    plan = QuantPlan.from_json((alike / "plan.json").read_text())
    first = next(iter(plan.layers))
    differs = replace(plan, layers={**plan.layers, first: (None, *plan.layers[first][1:])})
    found = refusals(differs, refusal, "one segment")
    assert [*found] == [first] and found[first].field == "segments"
    by_segment = LayerScheme(W8, TOKEN, (SmoothSpec(0.5, per_segment=True),))
    both = QuantPlan((0.0, 0.5, 1.0), {"x": by_segment}, {"a": ("x", "x")})
    assert refusals(both, refusal, "one segment")["a"].field == "segments"
    with pytest.raises(UserError, match="a has segments"):
        raise_refused("comfyui", refusals(both, refusal, "one segment"), True)


def test_a_width_that_no_format_has_is_refused(tmp_path: Path, configure: Configure, capsys) -> None:
    save(videos.wan21, tmp_path / "model")
    overrides = [f"model.path='{tmp_path}/model'", "model.num_frames=5", "name=x"]
    adapter: ModelAdapter = instantiate(configure("model=wan2.1_1.3b", *overrides).model, _convert_="all")
    artifact = artifact_of(adapter, Recipe(QuantSpec(4, False, "channel"), None), tmp_path / "quantized")
    assert main(["export", str(artifact), "--to", "comfyui"]) == 2
    assert "blocks.0.attn1.to_q has in_features=24, which divide into no groups" in capsys.readouterr().err


def test_a_layer_that_the_plan_names_and_leaves_in_float_stays_so(tmp_path: Path) -> None:
    adapter = tiny_adapter()
    denoiser = adapter.denoiser_of(adapter.load())
    names, scheme = linear_names(denoiser), LayerScheme(W8, TOKEN)
    kept = denoiser.get_submodule("transformer_blocks.1.ff.net.2").weight.detach().clone()
    plan = QuantPlan((0.0, 1.0), {"w8a8": scheme}, {n: ("w8a8",) for n in names if ".ff." in n})
    plan = replace(plan, layers={**plan.layers, "transformer_blocks.1.ff.net.2": (None,)})
    quantize_denoiser(denoiser, plan, None)
    save_denoiser(tmp_path / "quantized", denoiser, plan, {"model": adapter.to_dict(), "float_dtype": None} | BITS)
    assert main(["export", str(tmp_path / "quantized"), "--to", "comfyui"]) == 0
    tensors = load_file(tmp_path / "exports" / "comfyui.safetensors")
    assert torch.equal(tensors["blocks.1.mlp.fc2.weight"].float(), kept)
    assert "blocks.1.mlp.fc2.comfy_quant" not in tensors and "blocks.1.mlp.fc1.comfy_quant" in tensors


def test_a_corrected_output_does_not_go(tiny, tmp_path: Path, capsys) -> None:
    folder = Path(shutil.copytree(tiny("int8"), tmp_path / "quantized"))
    meta = json.loads((folder / "meta.json").read_text()) | {"correction": "ptqd_mean"}
    meta["sha256"]["meta.json"] = meta_sha256(meta)
    (folder / "meta.json").write_text(json.dumps(meta))
    assert main(["export", str(folder), "--to", "comfyui"]) == 2
    assert "quant.correction=null" in capsys.readouterr().err


def test_an_export_is_made_once_and_replaces_nothing_else(tiny, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.safetensors"
    words = ["export", str(tiny("int8")), "--to", "comfyui", "--out", str(out)]
    assert main(words) == 0
    before = out.stat()
    assert main(words) == 0
    assert out.stat().st_mtime_ns == before.st_mtime_ns
    whole = out.read_bytes()
    out.write_bytes(whole[:-9])  # its header is there
    assert main(words) == 0 and out.read_bytes() == whole
    assert {path.name for path in tmp_path.iterdir()} == {"out.safetensors", "out.README.md"}
    assert main(["export", str(tiny("int4")), *words[2:]]) == 2
    assert "is no export of this artifact" in capsys.readouterr().err and out.stat().st_size == before.st_size


def test_damaged_bytes_leave_no_file(tiny, tmp_path: Path, capsys) -> None:
    folder = Path(shutil.copytree(tiny("int8"), tmp_path / "quantized"))
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"\x55" * 50)
    assert main(["export", str(folder), "--to", "comfyui", "--out", f"{tmp_path}/out.safetensors"]) == 2
    assert "was altered" in capsys.readouterr().err and not [*tmp_path.glob("*.safetensors")]


def test_a_model_without_a_known_release_is_refused(tmp_path: Path, configure: Configure, capsys) -> None:
    adapter: ModelAdapter = instantiate(configure("model=tiny_video", "name=x").model, _convert_="all")
    artifact = artifact_of(adapter, Recipe(W8, TOKEN), tmp_path / "quantized")
    assert main(["export", str(artifact), "--to", "comfyui"]) == 2
    assert "not for LatteTransformer3DModel" in capsys.readouterr().err
