"""Whole quantized pipelines: diffusers alone, the hub's cache and `load_quantized` give the same samples to the bit."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, PipelineQuantizationConfig, PixArtTransformer2DModel
from huggingface_hub import constants
from hydra.utils import instantiate
from torch import Tensor

from viditq.errors import UserError
from viditq.export.diffusers import export
from viditq.interop.folder import DESCRIPTION
from viditq.interop.quantizer import ViditqConfig
from viditq.loading import load_quantized
from viditq.models import hub
from viditq.models.adapter import ModelAdapter
from viditq.models.generate import noise_generator, with_settings
from viditq.quant import (
    QuantLinear,
    QuantSpec,
    Recipe,
    RotateSpec,
    linear_names,
    quantize_denoiser,
    save_denoiser,
)

sys.path.append(str(Path(__file__).parents[1] / "models"))
from zoo import images, videos
from zoo.saving import save

W4, A8 = QuantSpec(4, granularity="channel"), QuantSpec(8, granularity="token", dynamic=True)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Of the shrunk run, as its README has them.
SETTINGS = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 32, "width": 32, "clean_caption": False}
SETTINGS |= {"use_resolution_binning": False, "max_sequence_length": 16}


def picture(pipeline: Any, **settings: Any) -> Tensor:
    call = pipeline("a small red circle", generator=[noise_generator(0, 0)], output_type="pt", **settings)
    images: Tensor = call[0]
    return images


@pytest.fixture(scope="module")
def expected(finished_run: Path) -> Tensor:
    return picture(load_quantized(finished_run))


@pytest.mark.parametrize("how", [{}, {"dtype": torch.float32}, {"device_map": "cpu"}, {"disable_mmap": True}], ids=str)
def test_diffusers_alone(exported: Path, expected: Tensor, how: dict[str, Any]) -> None:
    pipeline = DiffusionPipeline.from_pretrained(exported, **how)
    assert isinstance(pipeline.transformer.transformer_blocks[0].attn1.to_q, QuantLinear)
    sample = picture(pipeline, **SETTINGS)
    if "device_map" in how:  # accelerate watches each module, which keeps blocks from being fused
        assert (sample - expected).abs().max() < 0.02
    else:
        assert torch.equal(sample, expected)


def test_one_part_of_it(exported: Path, expected: Tensor) -> None:
    part = PixArtTransformer2DModel.from_pretrained(exported, subfolder="transformer")
    pipeline = DiffusionPipeline.from_pretrained(exported, transformer=part)
    assert torch.equal(picture(pipeline, **SETTINGS), expected)


def test_a_configuration_for_the_pipeline_gives_way_to_the_files(exported: Path, expected: Tensor) -> None:
    config = ViditqConfig(Recipe(W4, A8).resolve(["transformer_blocks.0.attn1.to_q"]))
    whole = PipelineQuantizationConfig(quant_mapping={"transformer": config})
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        pipeline = DiffusionPipeline.from_pretrained(exported, quantization_config=whole)
    assert torch.equal(picture(pipeline, **SETTINGS), expected)


def test_saved_pipelines_load_again(exported: Path, expected: Tensor, tmp_path: Path) -> None:
    DiffusionPipeline.from_pretrained(exported).save_pretrained(tmp_path / "saved", max_shard_size="500KB")
    assert len([*(tmp_path / "saved" / "transformer").glob("*.safetensors")]) > 2
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(picture(again, **SETTINGS), expected)
    ours = load_quantized(tmp_path / "saved")
    assert torch.equal(picture(ours, **SETTINGS), expected)


def test_ours_reads_it_with_the_models_settings(exported: Path, expected: Tensor, tmp_path: Path) -> None:
    assert torch.equal(picture(load_quantized(exported)), expected)
    assert torch.equal(picture(load_quantized(exported, memory_budget="4 MB")), expected)
    pipeline = load_quantized(exported, backend="fake")
    assert pipeline.transformer.transformer_blocks[0].attn1.to_q.backend_names == "fake"
    with pytest.raises(UserError, match="save_pretrained writes float models only"):
        pipeline.save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="memory_budget=10000 is too little"):
        load_quantized(exported, memory_budget=10_000)
    with pytest.raises(UserError, match=r"is a whole pipeline: leave out model_path"):
        load_quantized(exported, model_path=str(exported))


def test_the_timestep_is_told_by_the_pipeline_alone(exported: Path) -> None:
    part = PixArtTransformer2DModel.from_pretrained(exported / "transformer")
    with pytest.raises(UserError, match="holds 2 variants but the noise level is unknown"):
        part.transformer_blocks[0].attn1.to_q(torch.zeros(1, 1, 192))


# The hub --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], str]:
    """(folder, name) -> its id in a cache as the hub's own client lays it out."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(folder: Path, name: str) -> str:
        repository = tmp_path / "hub" / f"models--somebody--{name}"
        snapshot = repository / "snapshots" / COMMIT
        for path in (p for p in folder.rglob("*") if p.is_file()):
            blob = repository / "blobs" / str(path.relative_to(folder)).replace("/", "--")
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, blob)
            link = snapshot / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
        hub._snapshot.cache_clear()
        return f"somebody/{name}"

    return put


def test_ids_of_the_hub(
    exported: Path, finished_run: Path, expected: Tensor, cached: Callable[[Path, str], str], tmp_path: Path
) -> None:
    whole = cached(exported, "tiny-image-w4a8")
    theirs = DiffusionPipeline.from_pretrained(whole, cache_dir=tmp_path / "hub", local_files_only=True)
    assert torch.equal(picture(theirs, **SETTINGS), expected)
    assert torch.equal(picture(load_quantized(whole)), expected)
    assert torch.equal(picture(load_quantized(cached(finished_run / "quantized", "artifact"))), expected)
    with pytest.raises(UserError, match=r"'somebody/nothing' .* is no folder here, not in the hub's cache"):
        load_quantized("somebody/nothing")
    with pytest.raises(UserError, match=r"'somebody/artifact' \(revision v2\)"):
        load_quantized("somebody/artifact", revision="v2")


def test_a_pipeline_that_nobody_quantized(tmp_path: Path, model_copy: Path) -> None:
    with pytest.raises(UserError, match="is a pipeline without parts that viditq quantized"):
        load_quantized(model_copy)


def test_a_description_of_another_version(exported: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    values = json.loads((copy / DESCRIPTION).read_text())
    (copy / DESCRIPTION).write_text(json.dumps(values | {"format_version": 7}))
    with pytest.raises(UserError, match="has format version 7; this program reads 1"):
        load_quantized(copy)


# Other pipelines ------------------------------------------------------------------------------------------------------


@pytest.fixture
def quantized_from(configure: Callable[..., Any], tmp_path: Path) -> Callable[..., tuple[Path, Path, ModelAdapter]]:
    """(model, overrides) -> artifact, exported folder and adapter; without statistics, float_dtype as given."""

    def make(model: str, *overrides: str, float_dtype: str | None = None) -> tuple[Path, Path, ModelAdapter]:
        few = ("model.num_steps=2", "model.height=32", "model.width=32")
        adapter = instantiate(configure(f"model={model}", "name=x", *few, *overrides).model, _convert_="all")
        denoiser = adapter.denoiser_of(adapter.load())
        if float_dtype is not None:
            denoiser.to(getattr(torch, float_dtype))
        names = linear_names(denoiser)
        kept = adapter.linear_roles(names)
        plan = Recipe(W4, A8, RotateSpec()).resolve([name for name in names if kept[name] != "float"])
        quantize_denoiser(denoiser, plan, None, timestep_scale=adapter.timestep_scale)
        meta = {"model": adapter.to_dict(), "float_dtype": float_dtype}
        save_denoiser(tmp_path / "artifact", denoiser, plan, meta)
        export(tmp_path / "artifact", tmp_path / "out")
        return tmp_path / "artifact", tmp_path / "out", adapter

    return make


def assert_same_samples(artifact: Path, out: Path, adapter: ModelAdapter) -> Any:
    expected = picture(load_quantized(artifact))
    theirs = DiffusionPipeline.from_pretrained(out, dtype=adapter.torch_dtype)
    assert torch.equal(picture(with_settings(adapter, theirs)), expected)
    assert torch.equal(picture(load_quantized(out)), expected)
    return theirs


def test_a_video(quantized_from: Callable[..., Any]) -> None:
    assert_same_samples(*quantized_from("tiny_video"))


def test_two_denoisers(quantized_from: Callable[..., Any], tmp_path: Path) -> None:
    save(videos.wan22, tmp_path / "wan")
    few = ("model.dtype=float32", "model.num_frames=5", "model.num_steps=3")
    theirs = assert_same_samples(*quantized_from("wan2.2", f"model.path='{tmp_path / 'wan'}'", *few))
    for part in (theirs.transformer, theirs.transformer_2):
        assert isinstance(part.blocks[0].attn1.to_q, QuantLinear)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_of_a_narrower_type(quantized_from: Callable[..., Any], dtype: str) -> None:
    """`quant.float_dtype`: the pipeline goes on in its own type, and the denoiser in another."""
    artifact, out, adapter = quantized_from("tiny_image", f"model.dtype={dtype}", float_dtype="bfloat16")
    theirs = assert_same_samples(artifact, out, adapter)
    assert theirs.transformer.dtype == getattr(torch, dtype)
    assert theirs.transformer.pos_embed.proj.weight.dtype == torch.bfloat16


def test_flux_in_half_precision(quantized_from: Callable[..., Any], tmp_path: Path) -> None:
    save(images.flux_dev, tmp_path / "flux")
    artifact, out, adapter = quantized_from("flux_dev", f"model.path='{tmp_path / 'flux'}'", "model.dtype=bfloat16")
    assert isinstance(assert_same_samples(artifact, out, adapter), FluxPipeline)
