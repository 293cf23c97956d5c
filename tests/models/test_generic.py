"""model=diffusers: pipelines without a yaml, by what is guessed and measured of them; real classes, random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from zoo import guessed, guessed_videos, guided, images, sketched, unlisted, videos
from zoo.saving import save

from viditq.errors import UserError
from viditq.models.adapter import ModelAdapter
from viditq.models.generate import _as_tensor, _call, noise_generator, with_settings
from viditq.models.text import encode_prompt
from viditq.quant import linear_names

SHRUNK = ["name=x", "model=diffusers", "model.num_steps=4", "model.height=32", "model.width=32"]
PROMPT = "a small red circle"
CLIP = "model.num_frames=5"
# builder -> overrides, Linears by role, timestep scale, negative prompt
KNOWN: dict[Callable[[], Any], tuple[list[str], dict[str, int], Any, str | None]] = {
    videos.sana_video: ([CLIP], {"self_attention": 8, "cross_attention": 8, "float": 6}, 1000.0, None),
    guided.krea2: ([], {"self_attention": 8, "mlp": 6, "text_refiner": 14, "float": 12}, 1.0, ""),
    guided.flux2_klein: (
        ["+model.encode.text_encoder_out_layers=[1,2]"],
        {"joint_attention": 16, "mlp": 12, "float": 9},
        1.0,
        "",
    ),
    guided.hunyuan_image: ([], {"joint_attention": 11, "mlp": 6, "text_refiner": 6, "float": 16}, 1000.0, ""),
    guided.hunyuan_video15: ([CLIP], {"joint_attention": 8, "mlp": 4, "text_refiner": 6, "float": 17}, 1000.0, ""),
    unlisted.lumina2: (
        [],
        {"self_attention": 12, "mlp": 9, "text_refiner": 7, "float": 9},
        {"at_noise": 0.0, "at_clean": 1.0, "argument": "timestep"},
        None,
    ),
    unlisted.mochi: (
        ["model.num_frames=7"],
        {"joint_attention": 15, "mlp": 6, "float": 12},
        {"at_noise": 0.0, "at_clean": 1000.0, "argument": "timestep"},
        None,
    ),
    unlisted.chroma: ([], {"joint_attention": 22, "mlp": 12, "float": 7}, 1.0, None),
    unlisted.ovis_image: ([], {"joint_attention": 22, "mlp": 12, "float": 12}, 1.0, None),
    unlisted.skyreels_v2: ([CLIP], {"self_attention": 8, "cross_attention": 8, "mlp": 4, "float": 6}, 1000.0, None),
    unlisted.prx: ([], {"self_attention": 6, "mlp": 6, "float": 8}, 1.0, None),
    unlisted.ernie_image: ([], {"self_attention": 8, "mlp": 6, "float": 6}, 1000.0, None),
    sketched.glm_image: ([], {"self_attention": 8, "mlp": 4, "float": 13}, 1000.0, None),
    images.aura_flow: ([], {"joint_attention": 12, "mlp": 9, "float": 9}, 1.0, None),
    guessed.hunyuan_dit: ([], {"self_attention": 16, "cross_attention": 16, "mlp": 8, "float": 17}, 1000.0, None),
    guessed.bria: ([], {"joint_attention": 22, "mlp": 12, "float": 12}, 1000.0, None),
    guessed.bria_fibo: ([], {"joint_attention": 22, "mlp": 12, "float": 16}, 1000.0, None),
    guessed.lumina_next: (
        [],
        {"self_attention": 6, "cross_attention": 8, "mlp": 6, "float": 8},
        {"at_noise": 0.0, "at_clean": 1.0, "argument": "timestep"},
        None,
    ),
    guessed.nucleus_moe: ([], {"self_attention": 30, "mlp": 10, "float": 16}, 1.0, ""),
    guessed_videos.anyflow: ([CLIP], {"self_attention": 8, "cross_attention": 8, "mlp": 4, "float": 8}, 1000.0, None),
    guessed_videos.anyflow_far: (
        [CLIP],
        {"self_attention": 8, "cross_attention": 8, "mlp": 4, "float": 8},
        1000.0,
        None,
    ),
    guessed_videos.easyanimate: (
        [CLIP, "+model.encode.negative_prompt=''"],
        {"joint_attention": 12, "mlp": 6, "float": 9},
        1000.0,
        None,
    ),
    guessed_videos.helios: (
        ["model.num_frames=33"],
        {"self_attention": 8, "cross_attention": 8, "mlp": 4, "float": 6},
        1000.0,
        None,
    ),
    guessed_videos.motif_video: ([CLIP], {"joint_attention": 11, "mlp": 6, "float": 9}, 1000.0, None),
}

QUICK = (
    *(videos.sana_video, guided.krea2, guided.flux2_klein, guided.hunyuan_video15, unlisted.lumina2, unlisted.mochi),
    *(guessed.hunyuan_dit, guessed.nucleus_moe, guessed_videos.anyflow, guessed_videos.motif_video),
)


@pytest.mark.parametrize(
    "build", [pytest.param(b, marks=[pytest.mark.slow] * (b not in QUICK), id=b.__name__) for b in KNOWN]
)
def test_samples_are_those_of_the_pipelines_own_call(
    build: Callable[[], Any], configure: Callable[..., Any], tmp_path: Path
) -> None:
    own, roles, scale, negative = KNOWN[build]
    save(build, tmp_path / "model")
    cfg = configure(*SHRUNK, *own, f"model.path='{tmp_path / 'model'}'").model
    adapter: ModelAdapter = instantiate(cfg, _convert_="all")
    assert (adapter.timestep_scale, adapter.negative_prompt) == (scale, negative)
    found = [*adapter.linear_roles(linear_names(adapter.build_denoiser())).values()]
    assert {role: found.count(role) for role in dict.fromkeys(found)} == roles
    embeds = encode_prompt(adapter, adapter.load_text_part(), PROMPT)
    ours = _call(adapter, adapter.load(), [embeds], [3], 0, "pt")
    pipeline = with_settings(adapter, adapter.load_complete())
    given = {"generator": noise_generator(0, 3), "output_type": "pt", "return_dict": False}
    own = adapter.encode.get("negative_prompt")  # what the call chooses, or EasyAnimate is told, having none of its own
    theirs = _as_tensor(pipeline(prompt=PROMPT, **given, **({} if own is None else {"negative_prompt": own}))[0])
    assert ours.shape[-3:] == (3, 32, 32) and (ours.ndim == 4 or ours.shape[1] in (5, 7, 33))
    torch.testing.assert_close(ours.float(), theirs.reshape(ours.shape).float(), rtol=0, atol=1e-5)


def test_guidance_that_encodings_are_told_is_that_of_the_sample(
    configure: Callable[..., Any], folder_of: Callable[..., Path]
) -> None:
    """FIBO's call and its `encode_prompt` both take it."""
    samples = []
    for scale in (2, 5):
        own = [f"model.path='{folder_of(guessed.bria_fibo)}'", f"model.guidance_scale={scale}"]
        adapter: ModelAdapter = instantiate(configure(*SHRUNK, *own).model, _convert_="all")
        embeds = encode_prompt(adapter, adapter.load_text_part(), PROMPT)
        samples.append(_call(adapter, adapter.load(), [embeds], [3], 0, "pt"))
    assert (samples[0] - samples[1]).abs().max() > 1e-3


def test_an_encoding_that_fails_says_what_may_be_given(
    configure: Callable[..., Any], folder_of: Callable[..., Path]
) -> None:
    own = [CLIP, f"model.path='{folder_of(guessed_videos.easyanimate)}'"]
    adapter: ModelAdapter = instantiate(configure(*SHRUNK, *own).model, _convert_="all")
    with pytest.raises(UserError, match=r"EasyAnimatePipeline cannot encode .*model\.encode\.negative_prompt"):
        encode_prompt(adapter, adapter.load_text_part(), PROMPT)


def test_a_package_that_a_pipeline_asks_for_is_named(
    configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: Any, **__: Any) -> None:
        raise ImportError("`cosmos_guardrail` is not installed")

    monkeypatch.setattr("diffusers.PixArtAlphaPipeline.from_pretrained", absent)
    adapter: ModelAdapter = instantiate(configure("model=tiny_image", "name=x").model, _convert_="all")
    with pytest.raises(UserError, match=r"PixArtAlphaPipeline needs a package .*cosmos_guardrail"):
        adapter.load()
