"""The whole chain on a small Open-Sora: official checkpoint -> folder -> run, and embeddings made before."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from official_files import tiny_stdit, write_tiny_opensora
from safetensors.torch import load_file

from viditq.assets import SHIPPED
from viditq.data.prompt_files import read_prompts
from viditq.errors import UserError
from viditq.loading import load_quantized
from viditq.models.adapter import ModelAdapter
from viditq.models.opensora_pipeline import OpenSoraPipeline
from viditq.quant.artifact import read_meta

ROOT = Path(__file__).parents[1]
SMALL = ["model=opensora_v1", "model.dtype=float32", "model.height=32", "model.width=32", "model.num_frames=4"]
SMALL += ["model.encode.clean_caption=false", "data=opensora_prompts", "data.num_calibration_prompts=2"]
SMALL += ["metric=[psnr,relative_l2]", "noise_floor.num_prompts=0", "diagnosis.num_prompts=1"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What scripts/import_official.py makes of a random checkpoint and the other parts of tiny_video."""
    folder = tmp_path_factory.mktemp("models") / "opensora"
    checkpoint = write_tiny_opensora(folder.parent / "official.pth")
    arguments = ["opensora_v1", checkpoint, "--parts", SHIPPED / "tiny_video", "--out", folder]
    arguments += ["--num-heads", 4, "--position-scale", 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["import_official.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "scripts" / "import_official.py"), run_name="__main__")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("opensora cache")


@pytest.fixture(scope="module")
def finished(model_folder: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory, run: Callable) -> Path:
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("opensora runs") / "run"
    run(folder, cache, *SMALL, f"model.path='{model_folder}'")
    return folder


def test_run_quantizes_what_the_original_quantizes(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["metrics"]["psnr"] > 20
    plan = json.loads((finished / "quantized" / "plan.json").read_text())
    assert len(plan["layers"]) == 26 and all(name.startswith("blocks.") for name in plan["layers"])
    assert (finished / "report.html").stat().st_size > 10_000


def test_artifact_makes_the_runs_samples_from_text(finished: Path, model_folder: Path) -> None:
    pipeline = load_quantized(finished)
    assert isinstance(pipeline, OpenSoraPipeline)
    assert torch.equal(pipeline.transformer.null_caption, tiny_stdit().null_caption)
    prompt = read_prompts("shipped:prompts/opensora_t2v_samples_10.txt")[1]
    generator = [torch.Generator().manual_seed(1)]
    clip = pipeline(prompt, generator=generator, output_type="pt", return_dict=False)[0]
    stored = next(iter(load_file(finished / "samples" / "000001.safetensors").values()))
    difference = ((clip[0].clamp(0, 1) * 255).round() - stored.float()).abs()
    assert difference.max() <= 1 and difference.mean() < 0.01


def test_ptqd_with_a_learned_variance_and_guided_channels(
    model_folder: Path, cache: Path, tmp_path: Path, run: Callable
) -> None:
    """Three of four channels are guided, so that the error of the fourth is the caption's alone."""
    few = ["model.num_frames=2", "model.num_steps=3", "stages=[prompts,quantize,generate]"]  # of 4 frames, 4 channels
    options = [*SMALL, f"model.path='{model_folder}'", *few]
    for name in ("ptqd", "ptqd_mean"):
        run(tmp_path / name, cache, *options, f"quant.correction={name}")
    pipeline, mean = (load_quantized(tmp_path / name) for name in ("ptqd", "ptqd_mean"))
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert hasattr(pipeline.scheduler.step, "__wrapped__") and not hasattr(mean.scheduler.step, "__wrapped__")
    assert float(pipeline.transformer.output_correction.variance.min()) > 0
    files = [sorted((tmp_path / name / "samples").glob("*.safetensors")) for name in ("ptqd", "ptqd_mean")]
    assert len(files[0]) == len(files[1]) > 1
    first, second = (next(iter(load_file(paths[1]).values())) for paths in files)
    assert not torch.equal(first, second)
    prompt = read_prompts("shipped:prompts/opensora_t2v_samples_10.txt")[1]
    generator = [torch.Generator().manual_seed(1)]
    clip = pipeline(prompt, generator=generator, output_type="pt", return_dict=False)[0]
    difference = ((clip[0].clamp(0, 1) * 255).round() - first.float()).abs()
    assert difference.max() <= 1 and difference.mean() < 0.01
    with pytest.raises(UserError, match="sampler=null"):
        ModelAdapter.from_dict(
            {**read_meta(tmp_path / "ptqd" / "quantized")["model"], "scheduler": "DPMSolverMultistepScheduler"}
        )


def test_embeddings_made_before_replace_the_text_encoder(
    finished: Path, model_folder: Path, cache: Path, tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same embeddings give the same float samples; no text encoder is loaded; nothing cached is mixed up."""
    pipeline = OpenSoraPipeline.from_pretrained(model_folder, local_files_only=True, dtype=torch.float32)
    prompts = read_prompts("shipped:prompts/opensora_t2v_samples_10.txt")
    y, mask = torch.zeros(10, 2, 1, 120, 96), torch.zeros(10, 120, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        with torch.no_grad():
            embeds = pipeline.encode_prompt(prompt, clean_caption=False)[0][0]
        y[i, 0, 0, : len(embeds)], y[i, 1, 0] = embeds, pipeline.transformer.null_caption[0]
        mask[i, : len(embeds)] = 1
    torch.save({"y": y, "mask": mask}, tmp_path / "text_embeds.pth")
    monkeypatch.setattr(ModelAdapter, "load_text_part", lambda _: pytest.fail("the text encoder was loaded"))
    embeds_option = f"data.embeds='{tmp_path / 'text_embeds.pth'}'"
    options = [*SMALL, f"model.path='{model_folder}'", embeds_option, "stages=[prompts,reference]"]
    before = {path.name for path in (cache / "reference").iterdir()}
    run(tmp_path / "run", cache, *options)
    (new,) = {path.name for path in (cache / "reference").iterdir()} - before
    (old,) = before
    for index in range(2):
        ours, wanted = (load_file(cache / "reference" / f / f"{index:06d}.safetensors") for f in (new, old))
        assert all(torch.equal(ours[k], wanted[k]) for k in wanted)


def test_neither_text_encoder_nor_embeddings(model_folder: Path, tmp_path: Path, run: Callable) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for part in ("vae", "transformer", "scheduler"):
        (bare / part).symlink_to(model_folder / part)
    index = json.loads((model_folder / "model_index.json").read_text())
    (bare / "model_index.json").write_text(
        json.dumps(index | {"text_encoder": [None, None], "tokenizer": [None, None]})
    )
    with pytest.raises(UserError, match=r"no text_encoder.*data\.embeds"):
        run(tmp_path / "run", tmp_path / "cache", *SMALL, f"model.path='{bare}'", "stages=[prompts]")
