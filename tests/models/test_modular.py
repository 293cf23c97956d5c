"""Modular pipelines: what our class makes of their blocks is what diffusers' own pipeline makes."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hydra.utils import instantiate
from zoo import modular

from viditq.errors import UserError
from viditq.export import pipeline_folder
from viditq.files import read_json, write_json
from viditq.models.adapter import ModelAdapter
from viditq.models.generate import _call, noise_generator
from viditq.models.modular import MADE, TALKATIVE, driver, read_index
from viditq.models.text import encode_prompt

LAYERS = "+model.encode.text_encoder_out_layers=[1,2]"
SHRUNK = ["name=x", "model.height=32", "model.width=32", "model.dtype=float32", "model.num_steps=3", LAYERS]
TEXT = "a small red circle"


@pytest.fixture
def make(
    configure: Callable[..., Any], folder_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., ModelAdapter]:
    """(model, builder, *overrides) -> its adapter, shrunk."""
    modular.with_processor(monkeypatch)

    def make(model: str, build: Callable[[], Any], *overrides: str) -> ModelAdapter:
        own = [f"model.path='{folder_of(build)}'", *SHRUNK, *overrides]
        adapter: ModelAdapter = instantiate(configure(f"model={model}", *own).model, _convert_="all")
        return adapter

    return make


def theirs(blocks: Any, folder: Path, guidance: float | None, **given: Any) -> torch.Tensor:
    """The sample of diffusers' own pipeline, which it loads itself."""
    blocks.sub_blocks.pop("prompt_upsampler")
    pipeline = blocks.init_pipeline(str(folder))
    pipeline.load_components(dtype=torch.float32)
    if guidance is not None:
        pipeline.update_components(guider=pipeline.guider.new(guidance_scale=guidance))
    out: torch.Tensor = pipeline(
        prompt=TEXT,
        text_encoder_out_layers=(1, 2),
        height=32,
        width=32,
        num_inference_steps=3,
        generator=noise_generator(0, 3),
        output_type="pt",
        output="images",
        **given,
    )
    return out


@pytest.mark.parametrize(
    ("model", "build", "blocks", "guidance"),
    [
        ("flux3", modular.flux3, diffusers.Flux3AutoBlocks, 5.0),
        ("flux3", modular.flux3, diffusers.Flux3AutoBlocks, 1.0),
        ("flux3_distilled", modular.flux3_distilled, diffusers.Flux3DistilledAutoBlocks, None),
    ],
)
def test_samples_are_those_of_diffusers_own_pipeline(
    model: str,
    build: Callable[[], Any],
    blocks: Any,
    guidance: float | None,
    make: Callable[..., ModelAdapter],
) -> None:
    adapter = make(model, build, *([] if guidance is None else [f"model.guidance_scale={guidance}"]))
    embeds = encode_prompt(adapter, adapter.load_text_part(), TEXT)
    assert ("negative_prompt_embeds" in embeds) == (model == "flux3")
    ours = _call(adapter, adapter.load(), [embeds], [3], 0, "pt")
    expected = theirs(blocks(), adapter.folder, guidance)
    assert expected.std() > 1e-3
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_what_is_guessed_and_measured(make: Callable[..., ModelAdapter], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the blocks' tracebacks of the calls that end where they have told enough."""
    told: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger(TALKATIVE[0]), "filters", [lambda record: told.append(record) or True])
    adapter = make("diffusers", modular.flux3, "model.num_steps=4")
    assert adapter.encode_outputs == ["prompt_embeds", "negative_prompt_embeds"]
    assert adapter.encode == {"negative_prompt": "", "text_encoder_out_layers": [1, 2]}
    assert (adapter.timestep_scale, adapter.conditions) == (1.0, ["image"])
    assert not told


def test_an_index_of_blocks_reads_as_that_of_a_pipeline(folder_of: Callable[..., Path], tmp_path: Path) -> None:
    index = read_index(folder_of(modular.flux3))
    assert [*index] == ["_class_name", "text_encoder", "tokenizer", "vae", "transformer", "scheduler", MADE]
    assert index["text_encoder"] == ["transformers", "Qwen3VLForConditionalGeneration"]
    assert index[MADE] == {"scheduler": {"shift": 6.93}}
    write_json(tmp_path / "modular_model_index.json", {"_class_name": "SoraModularPipeline"})
    assert read_index(tmp_path) == {"_class_name": "SoraModularPipeline"}
    for values in ([1, 2], {"vae": [None, "AutoencoderKLFlux2", None]}):
        write_json(tmp_path / "modular_model_index.json", values)
        with pytest.raises(UserError, match=r"modular_model_index\.json is damaged"):
            read_index(tmp_path)


def test_a_scheduler_that_is_stored_goes_before_the_blocks_own(
    make: Callable[..., ModelAdapter], tmp_path: Path
) -> None:
    adapter = make("flux3", modular.flux3)
    folder = Path(shutil.copytree(adapter.folder, tmp_path / "model"))
    diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0).save_pretrained(folder / "scheduler")
    values = read_json(folder / "modular_model_index.json")
    spec = {"pretrained_model_name_or_path": "somewhere", "subfolder": "scheduler"}
    kind = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    write_json(folder / "modular_model_index.json", {**values, "scheduler": [*kind, {"type_hint": kind, **spec}]})
    other = make("flux3", modular.flux3, f"model.path='{folder}'")
    assert other.load().scheduler.config.shift == 2.0 and adapter.load().scheduler.config.shift == 6.93


def test_what_is_no_modular_pipeline_has_no_driver() -> None:
    assert driver("FluxPipeline") is None and driver("NoModularPipeline") is None
    assert driver("MiniMaxH3ModularPipeline") is None and driver("WanAnimate2ModularPipeline") is None  # clips
    assert driver("Flux3ModularPipeline") is driver("Flux3ModularPipeline")


def test_a_folder_for_diffusers_is_refused(make: Callable[..., ModelAdapter]) -> None:
    with pytest.raises(UserError, match=r"--to diffusers: Flux3ModularPipeline is made of blocks.*load_quantized"):
        pipeline_folder._refuse("diffusers", {}, make("flux3", modular.flux3))


def test_what_the_call_does_not_take_is_refused(make: Callable[..., ModelAdapter]) -> None:
    with pytest.raises(UserError, match=r"model\.call\.foo: Flux3ModularPipeline\.__call__ has no such argument"):
        replace(make("flux3", modular.flux3), call={"foo": 1})
    with pytest.raises(TypeError, match="foo"):
        make("flux3", modular.flux3).load()(foo=1)
