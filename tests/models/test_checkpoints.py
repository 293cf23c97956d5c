"""conf/checkpoints.yaml: every other checkpoint of a model composes, and samples in its steps."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import test_image_families
import test_zoo
import test_zoo_videos
import torch
from hydra.errors import InstantiationException, MissingConfigException
from hydra.utils import instantiate
from omegaconf.errors import InterpolationResolutionError
from safetensors.torch import save_file
from zoo import guided, images

import viditq
from viditq.checkpoints import checkpoints
from viditq.cli import user_message
from viditq.models.adapter import ModelAdapter
from viditq.models.generate import denoise
from viditq.models.schedulers import make_scheduler
from viditq.models.text import encode_prompt
from viditq.models.timestep_scale import levels_of
from viditq.models.trial import try_out

OPTIONS = [f"{model}/{name}" for model, names in checkpoints().items() for name in names]
DOCS = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
NOT_DISTILLED = {"flux2_klein_4b/base": guided.flux2_klein, "flux2_klein_9b/base": guided.flux2_klein}
QUICK = ("qwen_image/lightning_8", "z_image/base", "wan2.2/lightx2v_4", "ltx_video/distilled", "sana_sprint/steps_1")
FRAMES = {"wan2.1_14b": 5, "wan2.2": 5, "hunyuan_video": 5}
GUIDED = {"flux_dev": 1.0, "sana_sprint/steps_1": 0.1, "hunyuan_image_2.1/distilled": 1000.0, "hunyuan_video": 1000.0}


def _of(option: str) -> tuple[Callable[[], Any], int | None, list[str]]:
    """Builder of its tiny pipeline, frames, overrides that only that needs."""
    model = option.partition("/")[0]
    known = test_zoo_videos.MODELS.get(option) or test_zoo_videos.MODELS.get(model)
    if known is not None:
        return known.build, known.frames, []
    if model in test_zoo.MODELS:
        return test_zoo.MODELS[model][0], FRAMES.get(model), []
    family = test_image_families.FAMILIES.get(option) or test_image_families.FAMILIES[model]
    own = [text for text in family.overrides if not text.startswith(("model.num_steps", "model.guidance_scale"))]
    return NOT_DISTILLED.get(option, family.build), None, own


@pytest.fixture
def adapter_of(configure: Callable[..., Any], folder_of: Callable[..., Path]) -> Callable[..., ModelAdapter]:
    """(model or checkpoint, *overrides) -> its adapter, on a tiny pipeline."""

    def adapter_of(option: str, *overrides: str) -> ModelAdapter:
        build, frames, own = _of(option)
        folder = folder_of(build)
        paths = [f"model.path='{folder}'", "name=x", "model.dtype=float32"]
        values = checkpoints()[option.partition("/")[0]][option.partition("/")[2]] if "/" in option else {}
        paths += [f"model.denoiser_path='{folder}'"] if "denoiser_path" in values else []
        sizes = ["model.height=32", "model.width=32"] + ([f"model.num_frames={frames}"] if frames else [])
        cfg = configure(f"model={option}", *paths, *sizes, *own, *overrides)
        adapter: ModelAdapter = instantiate(cfg.model, _convert_="all")
        return adapter

    return adapter_of


@pytest.mark.parametrize("option", [pytest.param(o, marks=[pytest.mark.slow] * (o not in QUICK)) for o in OPTIONS])
def test_samples_in_its_steps(option: str, adapter_of: Callable[..., ModelAdapter]) -> None:
    """From pure noise downwards; the denoiser is called once a step, or twice where guidance has calls of its own."""
    adapter = adapter_of(option)
    values = checkpoints()[option.partition("/")[0]][option.partition("/")[2]]
    assert adapter.name == option.replace("/", "_") and adapter.num_steps == values.get("num_steps", adapter.num_steps)
    steps = try_out(adapter, make_scheduler(adapter))
    levels = levels_of(steps, adapter.timestep_scale)
    assert len(set(levels)) == adapter.num_steps
    assert levels == sorted(levels, reverse=True) and levels[0] == pytest.approx(1, abs=2e-3) and levels[-1] > 0
    calls = 2 if option in (*NOT_DISTILLED, "kandinsky6/lite", "cosmos3/super", "cosmos3/edge") else 1
    assert len(steps) == calls * adapter.num_steps


@pytest.mark.parametrize(("model", "factor"), GUIDED.items())
def test_guidance_is_an_input(model: str, factor: float, adapter_of: Callable[..., ModelAdapter]) -> None:
    """Of the denoiser, which is told it at every step; and part of what describes the model."""
    told = []
    for scale in (2.0, 3.0):
        steps = [] if "sana" in model else ["model.num_steps=1"]
        adapter = adapter_of(model, f"model.guidance_scale={scale}", *steps)
        assert adapter.to_dict()["guidance_scale"] == scale
        pipeline = adapter.load()
        denoiser = adapter.denoiser_of(pipeline)

        def keep(module: Any, args: Any, kwargs: Any) -> None:
            told.append(float(kwargs["guidance"][0]))

        denoiser.register_forward_pre_hook(keep, with_kwargs=True)
        denoise(adapter, pipeline, [encode_prompt(adapter, adapter.load_text_part(), "a red circle")], [0], 0)
    assert told == pytest.approx([2 * factor, 3 * factor])


def test_the_command_line_goes_before(configure: Callable[..., Any]) -> None:
    given = configure("model=qwen_image/lightning_8", "model.num_steps=6", "model.denoiser_path=folder", "name=x").model
    assert (given.num_steps, given.guidance_scale, given.denoiser_path) == (6, 1.0, "folder")
    assert given.pipeline == "QwenImagePipeline" and configure("model=ltx2_i2v/distilled", "name=x").metric.keys() >= {
        "first_frame_psnr"
    }


@pytest.mark.parametrize("option", ["ltx_video/distilled", "ltx2/distilled"])
def test_steps_that_are_named_one_by_one_are_counted(option: str, adapter_of: Callable[..., ModelAdapter]) -> None:
    with pytest.raises(InstantiationException, match=r"call.(timesteps|sigmas) has 8 steps and model.num_steps is 4"):
        adapter_of(option, "model.num_steps=4")


def test_a_lora_is_to_be_merged_first(configure: Callable[..., Any]) -> None:
    model = configure("model=wan2.2/lightx2v_4", "name=x").model
    with pytest.raises(InterpolationResolutionError) as error:
        instantiate(model, _convert_="all")
    message = user_message(error.value)
    assert message is not None and re.search("wan2.2_lightx2v_4 .* LoRA .*Distill-Loras.* Merge it first", message)


def test_a_merged_lora_is_what_is_sampled_with(
    adapter_of: Callable[..., ModelAdapter], folder_of: Callable[..., Path], tmp_path: Path
) -> None:
    """As docs/lora.md says: added to the float pipeline, merged, its denoiser saved."""
    pipeline = diffusers.FluxPipeline.from_pretrained(folder_of(images.flux_dev))
    layer = "transformer_blocks.0.attn.to_q"
    down, up = (torch.ones(shape) for shape in ((2, 16), (16, 2)))
    halves = {f"transformer.{layer}.lora_{half}.weight": part for half, part in (("A", down), ("B", up))}
    save_file(halves, tmp_path / "lora.safetensors")
    viditq.add_lora(pipeline, tmp_path / "lora.safetensors")
    viditq.merge_lora(pipeline)
    pipeline.transformer.save_pretrained(tmp_path / "merged" / "transformer")
    adapter = adapter_of("flux_dev/turbo_8", f"model.denoiser_path='{tmp_path}/merged'")
    both = [one.denoiser_of(one.load()).get_submodule(layer).weight for one in (adapter, adapter_of("flux_dev"))]
    torch.testing.assert_close(both[0], both[1] + 2)


@pytest.mark.parametrize(
    ("option", "words"), [("qwen_image/x", "qwen_image/lightning_8, qwen_image/lightning_4"), ("latte/turbo", "none")]
)
def test_others_are_refused(option: str, words: str, configure: Callable[..., Any]) -> None:
    with pytest.raises(MissingConfigException) as error:
        configure(f"model={option}", "name=x")
    assert f"There is no model/{option}" in str(user_message(error.value)) and words in str(user_message(error.value))


def test_the_table_is_in_the_docs() -> None:
    fields = set(inspect.signature(ModelAdapter).parameters)
    assert all(set(values) <= fields for names in checkpoints().values() for values in names.values())
    rows = re.findall(r"^\| `([\w.]+/\w+)`", DOCS, re.MULTILINE)
    assert sorted(rows) == sorted(OPTIONS)
