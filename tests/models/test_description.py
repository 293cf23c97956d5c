"""What a model's description decides: attention, labels, guesses, sizes, steps, and class names of old files."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch as dispatch
from hydra.utils import instantiate
from zoo import images, videos
from zoo.saving import save

from viditq.errors import UserError
from viditq.models import schedule
from viditq.models.adapter import ModelAdapter
from viditq.models.generate import generate
from viditq.models.guess import guess_settings
from viditq.models.labels import class_label
from viditq.models.native import op
from viditq.models.text import encode_prompt

Make = Callable[..., ModelAdapter]


@pytest.fixture(scope="module")
def make(configure: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """(model, builder, *overrides) -> the adapter of a tiny pipeline."""
    root = tmp_path_factory.mktemp("models")

    def make(model: str, build: Callable[[], Any], *overrides: str) -> ModelAdapter:
        folder = root / build.__name__
        if not folder.exists():
            save(build, folder)
        size = ("model.height=32", "model.width=32", "model.num_steps=2", "model.dtype=float32")
        cfg = configure(f"model={model}", f"model.path='{folder}'", *size, *overrides, "name=x")
        return instantiate(cfg.model, _convert_="all")

    return make


# Attention ------------------------------------------------------------------------------------------------------------


def backends(denoiser: torch.nn.Module) -> set[Any]:
    processors = (getattr(module, "processor", None) for module in denoiser.modules())
    return {p._attention_backend for p in processors if hasattr(p, "_attention_backend")}


def test_native_attention_is_set_on_the_denoiser_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    if op.missing():
        pytest.skip(f"needs {op.missing()}")
    monkeypatch.setattr(op, "HEAD_DIMS", range(8, 129, 8))  # the tiny model's heads have 8 channels
    before, _ = dispatch._AttentionBackendRegistry.get_active_backend()
    adapter = make("flux_dev", images.flux_dev, "model.attention=native")
    pipeline = adapter.load()
    assert backends(pipeline.transformer) == {dispatch.AttentionBackendName("viditq")}
    assert dispatch._AttentionBackendRegistry.get_active_backend()[0] == before
    assert backends(replace(adapter, attention=None).load().transformer) == {None}
    given = adapter.build_denoiser()
    given.load_state_dict(pipeline.transformer.state_dict(), assign=True)
    assert backends(adapter.load(given).transformer) == {dispatch.AttentionBackendName("viditq")}


@pytest.mark.parametrize("name", ["xformers", "flash", "sage"])
def test_attention_that_is_not_installed(name: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for flag in ("XFORMERS", "FLASH", "SAGE"):
        monkeypatch.setattr(dispatch, f"_CAN_USE_{flag}_ATTN", False)
    adapter = make("flux_dev", images.flux_dev)
    with pytest.raises(UserError, match=rf"model\.attention={name} needs the package .*install.*attention=null"):
        replace(adapter, attention=name)


def test_attention_that_cannot_be(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = make("flux_dev", images.flux_dev)
    with pytest.raises(UserError, match="'fast' is unknown; choose null or one of native, xformers, flash, sage"):
        replace(adapter, attention="fast")
    for flag in ("XFORMERS", "FLASH"):
        monkeypatch.setattr(dispatch, f"_CAN_USE_{flag}_ATTN", True)
    with pytest.raises(UserError, match=r"flash computes in half precision only: set model\.dtype=bfloat16"):
        replace(adapter, attention="flash")
    with pytest.raises(UserError, match="PixArtTransformer2DModel does not choose its attention"):
        make("pixart_alpha", images.pixart_alpha, "model.attention=xformers").build_denoiser()


# Classes --------------------------------------------------------------------------------------------------------------


def test_classes_by_name_and_number(make: Make) -> None:
    adapter = make("dit_xl2_256", images.dit_xl2_256)
    assert [class_label(adapter, name) for name in ("tench", "Tinca tinca", "white shark", "3")] == [0, 0, 2, 3]
    assert encode_prompt(adapter, None, "umbrella")["class_labels"].tolist() == [3]
    with pytest.raises(UserError, match=r"'gold fish' is no class.*close names are: goldfish.*Numbers work too"):
        class_label(adapter, "gold fish")
    with pytest.raises(UserError, match="no class 4; its classes are 0 to 3"):
        class_label(adapter, "4")


def test_size_that_the_model_does_not_make(make: Make) -> None:
    adapter = replace(make("dit_xl2_256", images.dit_xl2_256), height=64)
    pipeline = adapter.load()
    with pytest.raises(UserError, match=r"does not make samples of height=64; those it makes have model\.height=32"):
        generate(adapter, pipeline, [encode_prompt(adapter, pipeline, "1")], [0], 0)


@pytest.mark.parametrize(
    ("model", "build"), [("dit_xl2_256", images.dit_xl2_256), ("pixart_alpha", images.pixart_alpha)]
)
def test_class_names_of_the_repositories_of_2023(
    model: str, build: Callable[[], Any], make: Make, tmp_path: Path
) -> None:
    adapter = make(model, build)
    folder = Path(shutil.copytree(adapter.folder, tmp_path / "old"))
    for file, edit in ((folder / "model_index.json", "transformer"), (folder / "transformer" / "config.json", None)):
        content = json.loads(file.read_text())
        if edit:
            content[edit] = ["diffusers", "Transformer2DModel"]
        else:
            content["_class_name"] = "Transformer2DModel"
            content["norm_type"] = "ada_norm_zero" if model.startswith("dit") else "ada_norm_single"
        file.write_text(json.dumps(content))
    old = replace(adapter, path=str(folder))
    names = {n for n, _ in old.build_denoiser().named_parameters()}
    assert names == {n for n, _ in adapter.build_denoiser().named_parameters()}
    assert type(old.load().transformer) is type(adapter.load().transformer)


# Steps ----------------------------------------------------------------------------------------------------------------


def test_a_single_step_that_the_scheduler_cannot_do(make: Make) -> None:
    adapter = replace(make("pixart_alpha", images.pixart_alpha), num_steps=1)
    pipeline = adapter.load_complete()
    embeds = [encode_prompt(adapter, pipeline, "a small red circle")]
    with pytest.raises(UserError, match=r"PixArtAlphaPipeline does not sample in a single step.*model\.num_steps to 2"):
        generate(adapter, pipeline, embeds, [0], 0)


def test_noise_levels_of_the_schedule(make: Make) -> None:
    adapter = make("pixart_alpha", images.pixart_alpha)
    assert schedule.noise_levels(adapter) == pytest.approx([0.999, 0.4995], abs=1e-3)
    assert schedule.noise_levels(make("flux_dev", images.flux_dev)) == pytest.approx([1.0, 0.612], abs=1e-3)
    assert schedule.noise_levels(make("z_image", images.z_image)) == [1.0, 0.75]


# Settings that a pipeline would pass over -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline": "DiTPipeline"}, "DiTPipeline needs class_labels, which no prompt gives"),
        ({"pipeline": "logging"}, "is no pipeline class of diffusers"),
        ({"encode": {"foo": 1}}, r"model\.encode\.foo: PixArtAlphaPipeline\.encode_prompt has no such .*clean_caption"),
        ({"encode": {"prompt": "x"}}, r"model\.encode\.prompt: .* is given it by every run"),
        ({"call": {"foo": 1}}, r"model\.call\.foo: PixArtAlphaPipeline\.__call__ has no such argument"),
        ({"call": {"mask_feature": True}}, r"model\.call\.mask_feature"),  # in **kwargs, of an earlier version
        ({"call": {"generator": 0}}, r"model\.call\.generator: .* is given it by every run"),
        ({"call": {"num_inference_steps": 5}}, r"num_inference_steps=5 and model\.num_steps=2 are the same setting"),
        ({"call": {"height": 64}}, r"model\.call\.height=64 and model\.height=32 are the same setting"),
        ({"guidance_argument": "cfg"}, r"model\.guidance_scale=4\.5: PixArtAlphaPipeline takes no cfg"),
        ({"modality": "video"}, r"PixArtAlphaPipeline makes images\. Set model\.modality=image"),
        ({"num_frames": 5}, r"model\.num_frames=5: an image has one"),
    ],
)
def test_settings_that_would_change_nothing(changes: dict[str, Any], message: str, make: Make) -> None:
    with pytest.raises(UserError, match=message):
        replace(make("pixart_alpha", images.pixart_alpha), **changes)


def test_a_video_pipeline_makes_images_when_told_to(make: Make) -> None:
    adapter = make("wan2.1_1.3b", videos.wan21, "model.num_frames=5")
    with pytest.raises(UserError, match=r"model\.call\.num_frames=6 and model\.num_frames=5"):
        replace(adapter, call={"num_frames": 6})
    with pytest.raises(UserError, match=r"WanPipeline makes videos.*\+model\.call\.num_frames=1"):
        replace(adapter, modality="image", num_frames=1)
    single = replace(adapter, modality="image", num_frames=1, call={"num_frames": 1})
    pipeline = single.load_complete()
    embeds = [encode_prompt(single, pipeline, "a red circle")]
    assert generate(single, pipeline, embeds, [0], 0).shape == (1, 1, 3, 32, 32)


def test_a_class_label_is_not_encoded(make: Make) -> None:
    with pytest.raises(UserError, match=r"model\.encode\.foo: .* those to set are none"):
        replace(make("dit_xl2_256", images.dit_xl2_256), encode={"foo": 1})


# Guesses --------------------------------------------------------------------------------------------------------------


def test_guesses() -> None:
    part = ["diffusers", "X"]
    wan = guess_settings({"_class_name": "WanPipeline", "transformer": part, "transformer_2": part, "vae": part})
    assert wan["denoisers"] == ["transformer", "transformer_2"] and wan["modality"] == "video"
    flux = guess_settings({"_class_name": "FluxPipeline", "transformer": part, "transformer_2": [None, None]})
    assert flux["denoisers"] == ["transformer"] and flux["modality"] == "image"
    assert flux["encode_outputs"] == ["prompt_embeds", "pooled_prompt_embeds", None] and flux["encode"] == {}
    sd3 = guess_settings({"_class_name": "StableDiffusion3Pipeline", "transformer": part})
    assert sd3["encode"] == {"prompt_2": None, "prompt_3": None}  # encode_prompt has no defaults for them


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"_class_name": "SoraPipeline"}, r"SoraPipeline of model_index\.json is none of diffusers"),
        ({"_class_name": "DiTPipeline"}, "DiTPipeline has no encode_prompt"),
        ({"_class_name": "FluxPipeline", "vae": ["diffusers", "X"]}, r"name its denoisers: model\.denoisers"),
    ],
)
def test_what_cannot_be_guessed(index: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        guess_settings(index)


def test_what_is_not_guessed_has_to_be_given(make: Make) -> None:
    adapter = make("flux_dev", images.flux_dev)
    with pytest.raises(UserError, match=r"model\.timestep_scale has no value"):
        replace(adapter, timestep_scale=None)
    with pytest.raises(UserError, match=r"pattern 'nothing\.\*' of model\.keep_float matches no Linear"):
        replace(adapter, keep_float=["nothing.*"]).linear_roles(["proj_out"])


def test_descriptions_of_earlier_versions(make: Make) -> None:
    adapter = make("flux_dev", images.flux_dev)
    values = {k: v for k, v in adapter.to_dict().items() if k != "denoisers"}
    assert ModelAdapter.from_dict(values | {"denoiser": "transformer"}) == replace(adapter, denoisers=["transformer"])
