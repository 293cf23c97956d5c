"""What a pipeline is made of and what it samples from, against what the configuration says of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import diffusers
import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from rich.console import Console
from zoo import images, videos

from viditq.errors import UserError
from viditq.estimate import Estimate, estimate
from viditq.estimate.table import show
from viditq.experiment import build
from viditq.files import read_json
from viditq.job import Job
from viditq.loading import load_quantized
from viditq.models import parts
from viditq.models.adapter import ModelAdapter
from viditq.models.checks import check_call
from viditq.models.registry import find_class
from viditq.models.text import check_encodes
from viditq.quant.artifact import size_bytes
from viditq.quant.execution.linear import quant_linears
from viditq.run_dir import RunDir
from viditq.runner import run

Adapter = Callable[..., ModelAdapter]
SMALL = [
    *("name=t", "quant=w4a8", "model.num_steps=2", "model.height=32", "model.width=32", "model.num_frames=5"),
    *("model.dtype=float32", "data.num_prompts=2", "data.num_calibration_prompts=2", "batch_size=1", "metric=[psnr]"),
    *("noise_floor.num_prompts=0", "diagnosis.num_prompts=0", "logger=none"),
    "stages=[prompts,reference,calibrate,quantize,generate,evaluate]",
]


@pytest.fixture
def adapter_of(configure: Callable[..., Any]) -> Adapter:
    """(model, folder, *overrides) -> its adapter."""

    def adapter_of(model: str, folder: Path, *overrides: str) -> ModelAdapter:
        cfg = configure(f"model={model}", f"model.path='{folder}'", "name=x", *overrides)
        try:
            return instantiate(cfg.model, _convert_="all")
        except InstantiationException as error:
            assert isinstance(error.__cause__, UserError)
            raise error.__cause__ from None

    return adapter_of


def edited(folder: Path, target: Path, **values: Any) -> Path:
    """A copy of a pipeline with other entries in its index."""
    shutil.copytree(folder, target)
    file = target / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return target


# The pipeline's class -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("AutoencoderKL", "is no pipeline class of diffusers .* was made for PixArtAlphaPipeline"),
        ("UniPCMultistepScheduler", "is no pipeline class"),
        ("FluxPipeline", "is made of parts that the folder, made for PixArtAlphaPipeline, lacks: text_encoder_2"),
        ("StableDiffusion3Pipeline", r"lacks: text_encoder_2, tokenizer_2, text_encoder_3, tokenizer_3"),
    ],
)
def test_a_pipeline_of_another_class(
    name: str, words: str, folder_of: Callable[..., Path], adapter_of: Adapter
) -> None:
    with pytest.raises(UserError, match=words):
        adapter_of("pixart_alpha", folder_of(images.pixart_alpha), f"model.pipeline={name}")


def test_a_pipeline_of_the_same_parts_but_another_denoiser(folder_of: Callable[..., Path], adapter_of: Adapter) -> None:
    adapter = adapter_of("pixart_alpha", folder_of(images.pixart_alpha), "model.pipeline=SanaPipeline")
    with pytest.raises(UserError, match=r"takes \w+ as transformer; the folder has PixArtTransformer2DModel"):
        adapter.build_denoiser()


def test_a_pipeline_that_takes_the_same_denoiser(folder_of: Callable[..., Path], adapter_of: Adapter) -> None:
    adapter = adapter_of("pixart_alpha", folder_of(images.pixart_alpha), "model.pipeline=PixArtSigmaPipeline")
    assert adapter.build_denoiser() is not None


# What it samples from -------------------------------------------------------------------------------------------------


def test_a_pipeline_that_needs_an_image(folder_of: Callable[..., Path], tmp_path: Path, adapter_of: Adapter) -> None:
    """Of a yaml that names no conditions; model=diffusers finds them (test_conditions.py)."""
    absent = {"image_processor": [None, None], "image_encoder": [None, None]}
    folder = edited(folder_of(videos.wan21), tmp_path / "i2v", _class_name="WanImageToVideoPipeline", **absent)
    with pytest.raises(UserError, match=r"WanImageToVideoPipeline needs image, .*choose a text-to-image"):
        adapter_of("wan2.1_1.3b", folder, "model.pipeline=WanImageToVideoPipeline")


@pytest.mark.parametrize(
    ("pipeline", "argument"),
    [
        ("CogVideoXImageToVideoPipeline", "image"),
        ("LTXImageToVideoPipeline", "image"),  # whose default is None
        ("QwenImageEditPipeline", "image"),
        ("FluxImg2ImgPipeline", "image"),
        ("FluxFillPipeline", "image, mask_image"),
        ("FluxControlNetPipeline", "control_image"),
        ("StableDiffusion3InpaintPipeline", "image, mask_image"),
        ("WanVideoToVideoPipeline", "video"),
        ("WanAnimatePipeline", "image, pose_video, face_video"),
        ("I2VGenXLPipeline", "image"),
    ],
)
def test_pipelines_that_need_more_than_text(pipeline: str, argument: str) -> None:
    with pytest.raises(UserError, match=rf"{pipeline} needs {argument}, which no prompt gives"):
        check_call(find_class(pipeline), {"prompt_embeds"})


@pytest.mark.parametrize(
    "pipeline",
    ["WanPipeline", "FluxPipeline", "FluxKontextPipeline", "Flux2Pipeline", "LTXConditionPipeline", "WanVACEPipeline"],
)
def test_pipelines_that_can_do_without(pipeline: str) -> None:
    check_call(find_class(pipeline), {"prompt_embeds"})


@pytest.mark.parametrize(
    ("part", "words"), [("tokenizer", "holds no tokenizer,"), ("text_encoder", "no text_encoder,")]
)
def test_a_pipeline_that_cannot_encode(
    part: str, words: str, folder_of: Callable[..., Path], tmp_path: Path, adapter_of: Adapter
) -> None:
    adapter = adapter_of("wan2.1_1.3b", edited(folder_of(videos.wan21), tmp_path / "m", **{part: [None, None]}))
    with pytest.raises(UserError, match=rf"{words} and 2 prompts have no embeddings, first 'a'.*data\.embeds"):
        check_encodes(adapter, ["a", "b"])


# Denoisers ------------------------------------------------------------------------------------------------------------


def test_denoisers_by_class_and_by_name() -> None:
    index = {
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["somewhere", "Unknown"],
        "prior_prior": ["diffusers", "StableCascadeUNet"],
        "own": ["diffusers", "STDiT"],
        "vae": ["diffusers", "AutoencoderKL"],
        "unet_3": [None, None],
        "connectors": ["ltx2", "LTX2TextConnectors"],
        "controlnet": ["diffusers", "FluxControlNetModel"],
        "boundary_ratio": 0.875,
    }
    found = [name for name, entry in index.items() if parts.is_denoiser(name, entry)]
    assert found == ["transformer", "transformer_2", "prior_prior", "own"]


@pytest.mark.parametrize(
    ("denoisers", "floats", "words"),
    [
        (["transformer"], [], r"does not name: transformer_2\..*model\.denoisers=\[transformer,transformer_2\]"),
        (["transformer_2"], [], r"does not name: transformer\..*\+model\.float_denoisers=\[transformer\]"),
        (["transformer"], ["transformer"], "both have transformer"),
        (["transformer"], ["transformer_3"], r"model\.float_denoisers has 'transformer_3', which is no part"),
        (["transformer"], ["transformer_2", "vae"], r"model\.float_denoisers has 'vae', which is no denoiser"),
    ],
)
def test_denoisers_that_are_left_out(denoisers: list[str], floats: list[str], words: str) -> None:
    wan = ["diffusers", "WanTransformer3DModel"]
    index = {"transformer": wan, "transformer_2": wan, "vae": ["diffusers", "AutoencoderKLWan"]}
    with pytest.raises(UserError, match=words):
        parts.check_denoisers(denoisers, floats, index)


def test_a_yaml_of_one_denoiser_on_a_folder_of_two(folder_of: Callable[..., Path], adapter_of: Adapter) -> None:
    with pytest.raises(UserError, match=r"does not name: transformer_2\. They would run in float without a word"):
        adapter_of("wan2.1_14b", folder_of(videos.wan22))


def test_denoisers_left_in_float_on_purpose_are_told_and_counted(
    configure: Callable[..., Any],
    folder_of: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = [f"model.path='{folder_of(videos.wan22)}'", f"cache_dir='{tmp_path}/cache'"]
    one, both = (
        run(configure(f"model={model}", *SMALL, *where, *more), tmp_path / model)
        for model, more in (("wan2.1_14b", ["+model.float_denoisers=[transformer_2]"]), ("wan2.2", []))
    )
    assert "left in float, as model.float_denoisers asks: transformer_2" in capsys.readouterr().out
    assert one is not None and both is not None
    assert one["float_size_bytes"] == both["float_size_bytes"]
    half = one["float_size_bytes"] // 2  # the two are alike
    assert read_json(tmp_path / "wan2.1_14b" / "quantized" / "meta.json")["left_in_float_bytes"] == half
    assert one["size_bytes"] == size_bytes(tmp_path / "wan2.1_14b" / "quantized") + half
    assert one["average_weight_bits"] == pytest.approx((both["average_weight_bits"] + 16) / 2)
    assert one["average_activation_bits"] == pytest.approx((both["average_activation_bits"] + 16) / 2)
    pipeline = load_quantized(tmp_path / "wan2.1_14b")
    assert quant_linears(pipeline.transformer) and not quant_linears(pipeline.transformer_2)


def test_the_estimate_counts_denoisers_left_in_float(
    configure: Callable[..., Any], folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    where = [*SMALL, f"model.path='{folder_of(videos.wan22)}'", f"cache_dir='{tmp_path}/cache'"]

    def told(model: str, *more: str) -> Estimate:
        experiment = build(configure(f"model={model}", *where, *more))
        return estimate(Job(experiment, RunDir(tmp_path / model, experiment.tracked)), "meta")

    one, both = told("wan2.1_14b", "+model.float_denoisers=[transformer_2]"), told("wan2.2")
    assert one.float16 == both.float16 == 2 * one.left_in_float and both.left_in_float == 0  # the two are alike
    assert one.held["float"].nbytes == both.held["float"].nbytes == 2 * one.parts["transformer_2"][1]
    assert both.held["auto"].nbytes == both.weights.resident
    assert one.held["auto"].nbytes == one.weights.resident + one.parts["transformer_2"][1]
    console = Console(width=120, record=True)
    show(console, "t", "wan2.1_14b", one)
    assert "denoisers left in float, and the artifact" in console.export_text()


def test_a_search_counts_denoisers_left_in_float_in_its_bytes(
    configure: Callable[..., Any], folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    settings = [*SMALL, f"model.path='{folder_of(videos.wan22)}'", f"cache_dir='{tmp_path}/cache'"]
    settings += ["model=wan2.1_14b", "+model.float_denoisers=[transformer_2]", "quant/policy=sensitivity"]
    settings += ["quant.policy.budget.weight_bits=null", "quant.policy.budget.size_bytes=1000"]
    with pytest.raises(UserError, match="size_bytes=1000 is not possible") as error:
        build(configure(*settings))
    least = int(str(error.value).removesuffix(".").split()[-1])
    adapter: Any = instantiate(configure(*settings).model, _convert_="all")
    left = sum(2 * p.numel() for p in adapter.float_denoisers_of(adapter.load()).parameters())
    assert adapter.left_in_float_bytes() == left < least < 2 * left


def test_every_pipeline_of_diffusers_can_be_looked_at() -> None:
    """Signatures and hints of all of them are read without an error of another kind."""
    names = [name for name in dir(diffusers) if name.endswith("Pipeline") and name != "DiffusionPipeline"]
    refused = 0
    for name in names:
        if isinstance(getattr(diffusers, name, None), type):
            try:
                check_call(find_class(name), {"prompt_embeds"})
                parts.check_pipeline(name, {})
            except UserError:
                refused += 1
    assert 100 < refused <= len(names)


@pytest.mark.parametrize("absent", [["cosmos_guardrail"], ["torchvision"], ["cosmos_guardrail", "torchvision"]])
def test_packages_that_a_pipeline_fails_without_are_named(absent: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("cosmos_guardrail", "torchvision"):
        is_there = Mock(return_value=package not in absent)
        monkeypatch.setattr(f"diffusers.utils.import_utils.is_{package}_available", is_there)
    index = {name: ["diffusers", "X"] for name in ("text_encoder", "tokenizer", "transformer", "vae", "scheduler")}
    with pytest.raises(UserError, match=f"pip install {' '.join(absent)}[.]"):
        parts.check_pipeline("Cosmos2_5_PredictBasePipeline", index)
