"""What a model's description decides: attention, labels, guesses, sizes, steps, and class names of old files."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import attention_dispatch as dispatch
from hydra.utils import instantiate
from zoo import images, videos
from zoo.saving import save

from viditq.errors import UserError
from viditq.models import roles, schedule
from viditq.models.adapter import ModelAdapter
from viditq.models.checks import check_arguments
from viditq.models.generate import generate
from viditq.models.guess import guess_settings
from viditq.models.labels import class_label
from viditq.models.native import op
from viditq.models.particular import steps_setting
from viditq.models.settings import call_settings
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


NEGATIVE = ("negative_prompt_embeds", "negative_prompt_attention_mask")


@pytest.mark.parametrize(
    ("pipeline", "names"),
    [
        ("LongCatImagePipeline", ["prompt_embeds", None]),  # returned as expressions, named where they are called for
        ("Kandinsky5T2VPipeline", ["prompt_embeds_qwen", "prompt_embeds_clip", "prompt_cu_seqlens"]),
        ("PRXPipeline", ["prompt_embeds", "prompt_attention_mask", *NEGATIVE]),  # the last two only for some prompts
    ],
)
def test_embeddings_are_known_by_their_names_in_the_call(pipeline: str, names: list[str | None]) -> None:
    assert guess_settings({"_class_name": pipeline, "transformer": ["diffusers", "X"]})["encode_outputs"] == names


class Unreadable:
    """What its `encode_prompt` returns has no names."""

    def encode_prompt(self, prompt: str) -> Any:
        return tuple([prompt])

    def __call__(self, prompt_embeds: Any = None) -> Any:
        return tuple(self.encode_prompt(""))


def test_what_is_given_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    ernie = guess_settings({"_class_name": "ErnieImagePipeline", "transformer": ["diffusers", "X"]})
    assert ernie["encode_outputs"] == [None]  # a list of tensors, one a prompt, which is kept and given back
    monkeypatch.setattr("viditq.models.guess.find_class", lambda name: Unreadable)
    index = {"_class_name": "Unreadable", "backbone": ["diffusers", "X"]}
    with pytest.raises(UserError, match=r"name its denoisers: model\.denoisers"):
        guess_settings(index)
    with pytest.raises(UserError, match=r"encode_prompt returns is not understood; name it: model\.encode_outputs"):
        guess_settings(index, {"denoisers": ["backbone"], "encode_outputs": None})
    given = {"denoisers": ["backbone"], "encode_outputs": ["prompt_embeds"], "pipeline": None}
    found = guess_settings(index, given)
    assert (found["denoisers"], found["encode_outputs"]) == (["backbone"], ["prompt_embeds"])
    assert found["pipeline"] == "Unreadable"


def test_a_clip_whose_length_is_called_frames_is_a_video() -> None:
    sana = guess_settings({"_class_name": "SanaVideoPipeline", "transformer": ["diffusers", "X"]})
    assert sana["modality"] == "video"
    adapter = SimpleNamespace(
        num_steps=2, guidance_argument="guidance_scale", guidance_scale=None, height=None, width=None, call={}
    )
    adapter.modality, adapter.num_frames = "video", 9
    assert call_settings(adapter, diffusers.SanaVideoPipeline) == {"num_inference_steps": 2, "frames": 9}


def test_attention_over_an_image_or_another_stream_is_cross_attention() -> None:
    block = ["attn1.to_q", "attn2.to_q", "attn2.to_k", "attn2.add_k_proj", "attn2.add_v_proj"]
    found = roles.guess([f"blocks.0.{name}" for name in block])
    assert [found[f"blocks.0.{name}"] for name in block] == ["self_attention", *["cross_attention"] * 4]
    audio = ["audio_to_video_attn.to_q", "video_to_audio_attn.to_out.0", "audio_attn1.to_q", "audio_attn2.to_q"]
    found = roles.guess([f"transformer_blocks.0.{name}" for name in audio])
    assert [*found.values()] == ["cross_attention", *["sound"] * 3]  # of the frames to the sound; its own stream
    assert roles.guess(["blocks.0.av_cross_attention.to_q", "audio_text_transformer_blocks.0.attn.to_q"]) == {
        "blocks.0.av_cross_attention.to_q": "sound",
        "audio_text_transformer_blocks.0.attn.to_q": "sound",
    }
    joint = roles.guess(["transformer_blocks.0.attn.add_q_proj", "transformer_blocks.0.attn.to_q"])
    assert {*joint.values()} == {"joint_attention"}
    both = roles.guess(
        [f"double_blocks.0.attn.{kind}_attn_{part}" for kind in ("img", "txt") for part in ("qkv", "proj")]
    )
    assert {*both.values()} == {"joint_attention"}
    experts = roles.guess([f"blocks.4.img_mlp.{name}" for name in ("gate", "shared_expert.net.2")])
    assert [*experts.values()] == ["float", "mlp"]  # what chooses experts is no feed-forward
    assert [*roles.guess(["blocks.0.ff.gate", "blocks.0.ff.up"]).values()] == ["mlp", "mlp"]


def test_steps_that_are_counted_by_stage() -> None:
    """Helios' pyramid: as many at each size, the first ones more, unless the call names them."""
    name, pyramid = "pyramid_num_inference_steps_list", "HeliosPyramidPipeline"
    assert steps_setting(pyramid, 8, {}) == {name: [3, 3, 2]}
    assert steps_setting(pyramid, 8, {name: [2, 2, 4]}) == {name: [2, 2, 4]}
    assert steps_setting("HeliosPipeline", 8, {}) == {"num_inference_steps": 8}
    model: Any = SimpleNamespace(
        **{"pipeline": pyramid, "guidance_argument": "guidance_scale", "guidance_scale": 2.0, "num_steps": 8},
        **{"height": None, "width": None, "num_frames": 33, "modality": "video", "conditioning": "text"},
        **{"call": {name: [2, 2, 4]}, "encode": {}, "conditions": []},
    )
    check_arguments(model, diffusers.HeliosPyramidPipeline)
    for steps, given, message in ((8, [2, 2, 2], "name 3 numbers, which add up"), (2, None, "3 stages of a step")):
        model.num_steps, model.call = steps, {name: given} if given else {}
        with pytest.raises(UserError, match=message):
            check_arguments(model, diffusers.HeliosPyramidPipeline)


def test_gates_of_feed_forwards_are_no_modulation() -> None:
    """PRX has the three parts in the block itself; SANA-WM's gate stands alone, and so do those of AdaLN."""
    found = roles.guess([f"blocks.1.{part}_proj" for part in ("gate", "up", "down")])
    assert [*found.values()] == ["mlp"] * 3
    assert [*roles.guess(["layers.0.gate_up_proj", "layers.0.down_proj"]).values()] == ["mlp"] * 2
    refined = roles.guess([f"text_blocks.0.{part}_proj" for part in ("gate", "up", "down")])
    assert {*refined.values()} == {"text_refiner"}
    alone = ["blocks.1.attn.gate_proj", "blocks.1.gate_proj", "blocks.0.up_proj", "blocks.0.down_proj", "gate_proj"]
    alone += [f"blocks.0.adaln.{part}_proj" for part in ("gate", "up", "down")]
    alone += [f"{part}_proj" for part in ("up", "down")]  # outside of blocks
    assert {*roles.guess(alone).values()} == {"float"}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"_class_name": "SoraPipeline"}, r"SoraPipeline that the folder names is none of diffusers"),
        ({"_class_name": "DiTPipeline"}, r"DiTPipeline has no encode_prompt: .* as conf/model/dit_xl2_256\.yaml is"),
        ({"_class_name": "Cosmos3OmniPipeline", "vae": ["diffusers", "X"]}, r"name its denoisers: model\.denoisers"),
        ({"_class_name": "MiniMaxH3ModularPipeline"}, r"noise levels of frames and of sound .* take model=ltx2"),
        ({"_class_name": "JoyImageEditPlusPipeline"}, r"encoded together.* take JoyImageEditPipeline"),
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


def test_a_pipeline_that_takes_no_list_of_generators_gets_one_prompt_at_a_time(make: Make) -> None:
    adapter = make("flux_dev", images.flux_dev)
    pipeline, text = adapter.load(), adapter.load_text_part()
    embeds = [encode_prompt(adapter, text, prompt) for prompt in ("red", "blue")]
    expected = generate(adapter, pipeline, embeds[:1], [0], 0)
    plain = type(pipeline)

    @wraps(plain.__call__)
    def one(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs["generator"], list):
            raise ValueError("Passing a list of generators is not yet supported")
        return plain.__call__(self, *args, **kwargs)

    pipeline.__class__ = type("One", (plain,), {"__call__": one})
    assert torch.equal(generate(adapter, pipeline, embeds[:1], [0], 0), expected)
    with pytest.raises(UserError, match=r"Set batch_size=1 and model\.calibration_batch_size=1"):
        generate(adapter, pipeline, embeds, [0, 1], 0)


def test_a_negative_prompt_that_is_encoded_while_sampling_is_told_with_what_to_set(make: Make) -> None:
    adapter = make("flux_dev", images.flux_dev)
    pipeline, embeds = adapter.load(), [encode_prompt(adapter, adapter.load_text_part(), "red")]
    plain = type(pipeline)

    @wraps(plain.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.encode_prompt("ugly", None)
        return plain.__call__(self, *args, **kwargs)

    pipeline.__class__ = type("Negative", (plain,), {"__call__": call})
    with pytest.raises(UserError, match=r'a negative prompt of its own .* model\.negative_prompt=""'):
        generate(adapter, pipeline, embeds, [0], 0)
