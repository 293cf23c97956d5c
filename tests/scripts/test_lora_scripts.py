"""A LoRA trained for tiny_video, and what measures it: a few steps of each."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_scripts import load

import viditq
from viditq.data.moving_shapes import render
from viditq.models.generate import generate
from viditq.tiny.concept import concept_clips, concept_scenes


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a LoRA of two steps, made as the command line makes it."""
    folder = tmp_path_factory.mktemp("lora")
    script = load("scripts/train_lora.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "POOL", 4)
        patch.setattr(script, "BATCH", 2)
        patch.setattr(sys, "argv", ["train_lora.py", "--steps", "2", "--rank", "2", "--out", str(folder)])
        script.main()
        again = script.train(2, 2, 2e-3, 0, 4)
    tensors = load_file(folder / "pytorch_lora_weights.safetensors")
    assert tensors.keys() == again.keys() and all(torch.equal(tensors[name], again[name]) for name in again)
    return folder


@pytest.fixture(scope="module")
def bench(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleType, Any]:
    """measure_lora.py and its Bench, of two prompts, two steps and one seed; tests share what was sampled."""
    script = load("scripts/measure_lora.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "concept_scenes", lambda held_out: concept_scenes(held_out)[:2])
        lora = trained / "pytorch_lora_weights.safetensors"
        made = script.Bench(lora, tmp_path_factory.mktemp("bench"), [0])
    made.adapter = replace(made.adapter, num_steps=2)
    return script, made


def test_a_trained_lora_is_read_for_every_linear_of_the_blocks(trained: Path, bench: tuple[ModuleType, Any]) -> None:
    tensors = load_file(trained / "pytorch_lora_weights.safetensors")
    assert len(tensors) == 2 * 64 and {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())
    pipeline = bench[1].adapter.load()
    assert viditq.add_lora(pipeline, trained) == "pytorch_lora_weights"


def test_merged_and_added_are_one_float_model(bench: tuple[ModuleType, Any]) -> None:
    script, made = bench
    pipeline = replace(made.adapter, path=str(made.merged())).load()
    merged = generate(made.adapter, pipeline, made.embeds, [0, 1], 0)
    added, without = made.samples(script.FLOAT), made.samples(script.FLOAT_WITHOUT)
    assert int((merged.int() - added.int()).abs().max()) <= 1 < int((without.int() - added.int()).abs().max())


def test_the_table_tells_each_way_and_what_was_sampled_is_not_sampled_again(
    bench: tuple[ModuleType, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, made = bench
    names = [script.FLOAT, script.FLOAT_WITHOUT, *(f"w4a8: {way}" for way in script.WAYS)]
    clips = {name: made.samples(name) for name in names}
    lines = script.table(clips, made.scenes, made.prompts, ["w4a8"]).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == names
    assert clips["w4a8: merged, quantized"].ne(clips["w4a8: quantized, added"]).any()
    monkeypatch.setattr(script, "generate", lambda *_: pytest.fail("sampled again"))
    assert all(torch.equal(made.samples(name), clips[name]) for name in names)


def test_clips_as_captioned_are_told_from_others() -> None:
    script = load("scripts/measure_lora.py")
    scenes = concept_scenes(held_out=True)
    rings, filled = (
        (clips * 255).round().to(torch.uint8)
        for clips in (concept_clips(scenes, torch.Generator().manual_seed(0)), render(scenes, torch.Generator()))
    )
    assert min(script.as_captioned(rings, scenes)) > 0.9
    assert script.as_captioned(filled, scenes)[0] == 0 < min(script.as_captioned(filled, scenes)[1:])
    assert script.as_captioned(rings.roll(1, 0), scenes)[1] < 0.5
