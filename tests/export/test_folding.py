"""Foldable smoothing: one scale for all that read one tensor, and a model in which the layers before have taken it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from safetensors.torch import load_file
from test_comfyui import BITS, check_file
from test_sdnq import as_read
from test_vllm_omni import served
from torch import Tensor, nn
from zoo import images, videos
from zoo.saving import save

from viditq.errors import UserError
from viditq.export.folding import FoldedTensors, only_foldable, sites_of
from viditq.models.adapter import ModelAdapter
from viditq.models.settings import call_settings
from viditq.program import main
from viditq.quant import (
    Calibrator,
    ConvRotSpec,
    FoldableSpec,
    QuantSpec,
    Recipe,
    Rule,
    build_quantized,
    linear_names,
    load_denoiser,
    quantize_denoiser,
    save_denoiser,
)
from viditq.quant.artifact import read_meta
from viditq.quant.execution.linear import quant_linears
from viditq.quant.execution.model_linears import shapes_of
from viditq.quant.methods.transforms.foldable import foldable_scale, smooths_foldably, without_foldable

Configure = Callable[..., DictConfig]
MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "flux_dev": (images.flux_dev, "transformer_blocks.0.norm1.linear"),
    "sd3.5": (images.sd35, "transformer_blocks.1.norm1_context.linear"),
    "sd3.5_medium": (images.sd35_medium, "transformer_blocks.0.norm1.linear"),
    "qwen_image": (images.qwen_image, "transformer_blocks.1.txt_mod.1"),
    "z_image": (images.z_image, "layers.1.feed_forward.w3"),
    "hunyuan_video": (videos.hunyuan_video, "single_transformer_blocks.0.norm.linear"),
}
FOLDABLE = FoldableSpec(0.5)
W8, W4 = QuantSpec(8, True, "channel"), QuantSpec(3, False, "group", 2)
A8 = QuantSpec(8, True, "token", dynamic=True)
WEIGHTS_ONLY, W8A8 = Recipe(W4, None, FOLDABLE), Recipe(W8, A8, FOLDABLE)


@dataclass
class Case:
    """A tiny random model with loud channels, its statistics and one call of its denoiser."""

    adapter: ModelAdapter
    denoiser: Any
    stats: Any
    call: tuple[tuple[Any, ...], dict[str, Any]]

    def plan(self, recipe: Recipe) -> Any:
        names = linear_names(self.denoiser)
        floats = [name for name, role in self.adapter.linear_roles(names).items() if role == "float"]
        return recipe.with_rules([*(Rule(name, keep_float=True) for name in floats), *recipe.rules]).resolve(names)

    def artifact(self, recipe: Recipe, folder: Path, plan: Any = None) -> Path:
        denoiser = copy.deepcopy(self.denoiser)
        plan = plan or only_foldable(self.plan(recipe), denoiser)
        quantize_denoiser(denoiser, plan, self.stats, timestep_scale=self.adapter.timestep_scale)
        save_denoiser(folder, denoiser, plan, {"model": self.adapter.to_dict(), "float_dtype": None} | BITS)
        return folder

    @torch.no_grad()
    def output(self, denoiser: Any) -> Tensor:
        args, kwargs = self.call
        out = denoiser(*args, **kwargs)
        while not isinstance(out, Tensor):
            out = out[0] if isinstance(out, tuple | list) else next(iter(out.values()))
        return out.float()

    def ours(self, artifact: Path) -> Tensor:
        return self.output(load_denoiser(artifact, self.adapter.build_denoiser)[0])


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, configure: Configure) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def make(name: str) -> Case:
        if name not in made:
            made[name] = calibrated(name, tmp_path_factory.mktemp(name.replace(".", "_")) / "model", configure)
        return made[name]

    return make


def calibrated(name: str, folder: Path, configure: Configure) -> Case:
    build = {**MODELS, "pixart_sigma": (images.pixart_sigma, ""), "wan2.1_1.3b": (videos.wan21, "")}[name][0]
    save(build, folder)
    small = ["model.num_frames=5"] if name.startswith(("hunyuan", "wan")) else []
    size = ["model.height=16", "model.width=16", "model.dtype=float32", "++model.component_dtypes={}"]
    cfg = configure(f"model={name}", f"model.path='{folder}'", "name=x", *size, *small)
    adapter: ModelAdapter = instantiate(cfg.model, _convert_="all")
    pipeline = adapter.load_complete()
    denoiser, calls = adapter.denoiser_of(pipeline), list[Any]()
    loud = torch.Generator().manual_seed(0)
    for module in denoiser.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.data += torch.randn(module.bias.shape, generator=loud).exp()
    hook = denoiser.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with Calibrator(denoiser, linear_names(denoiser), timestep_scale=adapter.timestep_scale) as calibrator:
        calibrator.set_sample_seeds([1])
        settings = call_settings(adapter, pipeline) | {"num_inference_steps": 2, "output_type": "latent"}
        pipeline("a red fox", **settings, generator=torch.Generator().manual_seed(0))
    hook.remove()
    return Case(adapter, denoiser, calibrator.stats, calls[0])


def relative(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


def folded_denoiser(case: Case, artifact: Path) -> Any:
    """Of the tensors that an export writes."""
    meta = read_meta(artifact)
    denoiser: Any = case.adapter.build_denoiser()
    tensors = FoldedTensors(artifact, meta, sites_of(denoiser))
    assert not tensors.reasons
    build_quantized(denoiser, tensors.plan, timestep_scale=case.adapter.timestep_scale)
    for name, layer in quant_linears(denoiser).items():
        for variant in layer.variants:
            variant.dtype = getattr(torch, meta["dtypes"][name])
    state = {name: tensors.of(name) for name in tensors.state()}
    denoiser.load_state_dict({n: t.to(tensors.runs.get(n, t.dtype)) for n, t in state.items()}, assign=True)
    for layer in quant_linears(denoiser).values():
        layer.prepare()
    return denoiser


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(  # slow: activations too, which sites to fold at do not depend on
    "recipe", [WEIGHTS_ONLY, pytest.param(W8A8, marks=pytest.mark.slow)], ids=["weights", "w8a8"]
)
def test_the_folded_model_computes_the_same(name: str, recipe: Recipe, case, tmp_path: Path) -> None:
    artifact = case(name).artifact(recipe, tmp_path / "quantized")
    plan = json.loads((artifact / "plan.json").read_text())
    assert any("foldable" in scheme for scheme in plan["schemes"])
    ours = case(name).ours(artifact)
    theirs = case(name).output(folded_denoiser(case(name), artifact))
    # what is left is rounding, by which a code of an activation may flip
    assert relative(theirs, ours) < (2e-6 if recipe is WEIGHTS_ONLY else 5e-3)
    plain = case(name).artifact(Recipe(recipe.weight, recipe.activation), tmp_path / "plain")
    assert relative(case(name).ours(plain), ours) > 1e-3


@pytest.mark.parametrize("name", ["flux_dev", "sd3.5", "z_image"])
def test_in_bfloat16_folding_costs_no_more_than_bfloat16(name: str, case, tmp_path: Path) -> None:
    wide, half = case(name), copy.copy(case(name))
    half.denoiser, half.call = copy.deepcopy(wide.denoiser).to(torch.bfloat16), halved(wide.call)
    artifact = half.artifact(WEIGHTS_ONLY, tmp_path / "quantized")
    ours = half.output(load_denoiser(artifact, lambda: half.adapter.build_denoiser().to(torch.bfloat16))[0])
    theirs = half.output(folded_denoiser(half, artifact).to(torch.bfloat16))
    own = relative(half.output(half.denoiser), wide.output(wide.denoiser))
    assert relative(theirs, ours) < 2 * own
    assert name != "z_image" or torch.equal(theirs, ours)  # no 1 + scale, and powers of two


def halved(value: Any) -> Any:
    """Floating tensors in bfloat16, wherever they lie."""
    if isinstance(value, Tensor):
        return value.to(torch.bfloat16) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: halved(one) for key, one in value.items()}
    return type(value)(halved(one) for one in value) if isinstance(value, tuple | list) else value


@pytest.mark.parametrize("name", MODELS)
def test_what_reads_one_tensor_has_one_scale_and_nothing_else_is_smoothed(name: str, case, tmp_path: Path) -> None:
    artifact = case(name).artifact(W8A8, tmp_path / "quantized")
    layers = quant_linears(load_denoiser(artifact, case(name).adapter.build_denoiser)[0])
    sites = sites_of(case(name).denoiser)
    assert MODELS[name][1] in {site.source for site in sites}
    for site in sites:
        scales = [layers[reader].variants[0].chain[0].scale for reader in site.readers]
        assert all(torch.equal(scale, scales[0]) for scale in scales)
        assert scales[0].max() == 1 and torch.equal(scales[0].log2().round(), scales[0].log2())
        assert scales[0].min() < 1
    foldable = {reader for site in sites for reader in site.readers}
    assert {n for n, layer in layers.items() if len(layer.variants[0].chain)} == foldable
    if name == "z_image":
        assert foldable == {*layers}
    assert not any(n.endswith((".ff.net.2", ".proj_out", ".attn.to_add_out")) for n in foldable)


@pytest.mark.parametrize("name", MODELS)
def test_exports_fold(name: str, case, tmp_path: Path, capsys) -> None:
    """Codes are those of the artifact; ComfyUI's file is the same model under other names."""
    artifact = case(name).artifact(W8A8, tmp_path / "quantized")
    assert main(["export", str(artifact), "--to", "vllm-omni", "--out", str(tmp_path / "out")]) == 0
    theirs = served(copy.deepcopy(case(name).denoiser), tmp_path / "out" / "transformer")
    assert relative(case(name).output(theirs), case(name).ours(artifact)) < 5e-3
    codes = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    stored = load_file(artifact / "model.safetensors")
    for layer in quant_linears(load_denoiser(artifact, case(name).adapter.build_denoiser)[0]):
        qweight = stored[f"{layer}.variants.0.qweight"].view(torch.uint8)
        assert torch.equal(codes[f"{layer}.weight"].to(torch.int16) + 128, qweight.to(torch.int16))
    assert main(["export", str(artifact), "--to", "comfyui", "--out", str(tmp_path / "out.safetensors")]) == 0
    check_file(tmp_path / "out.safetensors", folded_denoiser(case(name), artifact), None)


@pytest.mark.parametrize("name", ["flux_dev", "sd3.5_medium", "qwen_image"])
def test_sdnq_and_torchao_fold(name: str, case, tmp_path: Path) -> None:
    artifact = case(name).artifact(WEIGHTS_ONLY, tmp_path / "quantized")
    ours = case(name).ours(artifact)
    assert main(["export", str(artifact), "--to", "sdnq", "--out", str(tmp_path / "sdnq")]) == 0
    theirs = as_read(tmp_path / "sdnq" / "transformer", copy.deepcopy(case(name).denoiser))
    assert relative(case(name).output(theirs), ours) < 2e-6
    assert main(["export", str(artifact), "--to", "torchao", "--out", str(tmp_path / "torchao")]) == 0
    theirs = copy.deepcopy(case(name).denoiser)
    theirs.load_state_dict(dense(tmp_path / "torchao" / "transformer"))
    assert relative(case(name).output(theirs), ours) < 2e-6


def dense(folder: Path) -> dict[str, Tensor]:
    """The weights that a folder's IntxUnpackedToInt8Tensors stand for."""
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    found = {name: tensor for name, tensor in tensors.items() if "._weight_" not in name}
    for name, codes in tensors.items():
        if name.endswith("._weight_qdata"):
            scale, zero = (tensors[name.replace("qdata", end)].float() for end in ("scale", "zero_point"))
            groups = codes.float().unflatten(1, (scale.shape[1], -1))
            found[name.replace("._weight_qdata", ".weight")] = ((groups - zero[..., None]) * scale[..., None]).flatten(
                1
            )
    return found


def test_a_reader_in_float_takes_its_part(case, tmp_path: Path) -> None:
    flux = case("flux_dev")
    rules = [Rule("transformer_blocks.0.attn.to_k", keep_float=True), Rule("single*.1.proj_mlp", keep_float=True)]
    artifact = flux.artifact(Recipe(W4, None, FOLDABLE, rules=rules), tmp_path / "quantized")
    assert relative(flux.output(folded_denoiser(flux, artifact)), flux.ours(artifact)) < 2e-6


def test_a_rotation_may_follow(case, tmp_path: Path) -> None:
    flux = case("flux_dev")
    recipe = Recipe(W8, A8, [FOLDABLE, ConvRotSpec(16)])
    artifact = flux.artifact(recipe, tmp_path / "quantized")
    assert relative(flux.output(folded_denoiser(flux, artifact)), flux.ours(artifact)) < 5e-3
    assert main(["export", str(artifact), "--to", "comfyui", "--out", str(tmp_path / "out.safetensors")]) == 0


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule("transformer_blocks.0.norm1.linear", smoothing=[], weight=W8)], "norm1.linear is quantized, whose rows"),
        (
            [Rule("*.0.attn.to_k", smoothing=[], weight=W8)],
            "attn.to_k, which reads the same input, is quantized without",
        ),
        ([Rule("*.0.attn.to_k", smoothing=FoldableSpec(0.9))], "Linears that read the same input have other scales"),
    ],
)
def test_what_stands_in_the_way_is_said(rules, message: str, case, tmp_path: Path, capsys) -> None:
    flux = case("flux_dev")
    recipe = Recipe(W8, A8, FOLDABLE, rules=rules)
    plan = flux.plan(recipe)
    foldable = {reader for site in sites_of(flux.denoiser) for reader in site.readers}
    plan = without_foldable(plan, [layer for layer in plan.layers if layer not in foldable])
    artifact = flux.artifact(recipe, tmp_path / "quantized", plan)
    for target in ("vllm-omni", "comfyui"):
        assert main(["export", str(artifact), "--to", target, "--out", f"{tmp_path}/out.safetensors"]) == 2
        told = capsys.readouterr().err
        assert "transforms=['foldable']" in told and message in told


def test_what_is_quantized_again_leaves_its_neighbours_as_they_are(case, tmp_path: Path, capsys) -> None:
    flux = case("flux_dev")
    six = QuantSpec(6, True, "token", dynamic=True)
    artifact = flux.artifact(Recipe(W8, A8, FOLDABLE, rules=[Rule("*.0.attn.to_k", activation=six)]), tmp_path / "q")
    words = ["export", str(artifact), "--to", "vllm-omni", "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "activation.bits=6" in capsys.readouterr().err
    assert main([*words, "--requantize"]) == 0
    assert "quantized again: 7 Linears" in capsys.readouterr().out  # q, k, v of one block, and proj_mlp of another
    theirs = served(copy.deepcopy(flux.denoiser), tmp_path / "out" / "transformer")
    assert relative(flux.output(theirs), flux.ours(artifact)) < 0.05


def test_parts_of_one_tensor_are_quantized_again_together_and_nothing_is_folded_around_them(
    case, tmp_path: Path, capsys
) -> None:
    flux = case("flux_dev")
    rules = [Rule("transformer_blocks.0.attn.to_k", keep_float=True)]
    artifact = flux.artifact(Recipe(W8, A8, FOLDABLE, rules=rules), tmp_path / "quantized")
    words = ["export", str(artifact), "--to", "comfyui", "--out", str(tmp_path / "out.safetensors")]
    assert main(words) == 2
    assert "attn.to_k has scheme='float'" in capsys.readouterr().err
    assert main([*words, "--requantize"]) == 0
    told = capsys.readouterr().out
    assert "quantized again: 3 Linears" in told
    worst = float(told.split("at most ")[1].split("%")[0])
    assert worst < 5
    stored, exported = load_file(artifact / "model.safetensors"), load_file(tmp_path / "out.safetensors")
    modulation = exported["double_blocks.0.img_mod.lin.weight"].float().chunk(6)
    plain = stored["transformer_blocks.0.norm1.linear.weight"].float().chunk(6)
    assert torch.equal(modulation[1], plain[1]) and not torch.equal(modulation[4], plain[4])  # q, k, v; the mlp


@pytest.mark.parametrize("name", ["pixart_sigma", "wan2.1_1.3b"])
def test_a_shared_modulation_is_refused_before_anything(name: str, case) -> None:
    found = case(name)
    with pytest.raises(UserError, match=r"blocks share one modulation.*FluxTransformer2DModel.*smoothing=static"):
        only_foldable(found.plan(W8A8), found.denoiser)
    plain = found.plan(Recipe(W8, A8))
    assert only_foldable(plain, found.denoiser) is plain


def test_a_quantized_modulation_is_refused_before_anything(case) -> None:
    flux = case("flux_dev")
    plan = flux.plan(Recipe(W8, A8, FOLDABLE, rules=[Rule("single_transformer_blocks.1.norm.linear", weight=W8)]))
    with pytest.raises(UserError, match=r"single_transformer_blocks\.1\.norm\.linear is quantized.*keep_float"):
        only_foldable(plan, flux.denoiser)


def test_the_scale() -> None:
    amax = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0, 0.13])
    assert foldable_scale(amax, 1.0).tolist() == [1, 0.5, 0.25, 0.125, 1, 2**-6]
    assert foldable_scale(amax, 0.0).tolist() == [1] * 6
    assert foldable_scale(torch.zeros(3), 0.5).tolist() == [1] * 3
    for wrong in ({"alpha": 1.5}, {"alpha": "auto"}, {"aggregate": "mean"}):
        with pytest.raises(UserError):
            FoldableSpec(**wrong)  # type: ignore[arg-type]


def test_of_a_model_every_linear_behind_a_modulation_is_found(case) -> None:
    for name in MODELS:
        denoiser = case(name).denoiser
        readers = [reader for site in sites_of(denoiser) for reader in site.readers]
        assert len({*readers}) == len(readers) and {*readers} <= shapes_of(denoiser).keys()
        if name == "z_image":
            continue  # all of its blocks
        ends = (".to_q", ".to_k", ".to_v", ".add_q_proj", ".add_k_proj", ".add_v_proj", ".net.0.proj", ".proj_mlp")
        blocks = ("transformer_blocks", "single_transformer_blocks")
        assert {n for n in shapes_of(denoiser) if n.startswith(blocks) and n.endswith(ends)} <= {*readers}
        assert smooths_foldably(case(name).plan(W8A8), readers[0])
