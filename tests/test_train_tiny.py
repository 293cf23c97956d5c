"""One step of everything that scripts/train_tiny.py trains."""

import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from hydra.utils import instantiate
from transformers import T5EncoderModel

from viditq.data.moving_shapes import SCENES, render
from viditq.metrics.clip_encoder import load_clip
from viditq.metrics.shapes import load_judge
from viditq.models.generate import with_settings
from viditq.tiny import image_to_video

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_tiny.py"


HARD = ["image_hard", "video_hard", "export_hard"]
I2V = ["vae_i2v", "i2v", "export_i2v"]


def train(folder: Path, monkeypatch: pytest.MonkeyPatch, *stages: str) -> None:
    """These stages, without any those that ship; one step each."""
    options = ["--max-steps", "1", "--work", str(folder / "work"), "--out", str(folder / "assets")]
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", *options, *(["--stages", *stages] if stages else [])])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        train(folder, patch)
        train(folder, patch, *I2V)
    return folder


@pytest.fixture(scope="module")
def trained_hard(trained: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        train(trained, patch, *HARD)


# Slow: the same networks with outliers in place.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_image_hard", "tiny_video_hard"])
def test_exported_hard_pipeline_runs(name: str, trained: Path, trained_hard: None, configure: Callable) -> None:
    test_exported_pipeline_runs(name, trained, configure)


@pytest.mark.parametrize("name", ["tiny_image", "tiny_video"])
def test_exported_pipeline_runs(name: str, trained: Path, configure: Callable) -> None:
    adapter = instantiate(
        configure(f"model={name.removesuffix('_hard')}", "model.num_steps=2", "name=x").model, _convert_="all"
    )
    adapter = replace(adapter, path=str(trained / "assets" / name))
    pipeline = with_settings(adapter, adapter.load_complete())
    out = pipeline("a small red circle on a white background", output_type="pt", return_dict=False)[0]
    assert out.isfinite().all() and out.shape[-3:] == (3, 32, 32)
    files = (trained / "assets" / name).rglob("*")
    assert sum(file.stat().st_size for file in files if file.is_file()) <= 20e6


def test_exported_image_to_video_runs(trained: Path) -> None:
    """The text encoder is T5's with another name, the condition is what the denoiser was trained on."""
    folder = trained / "assets" / "tiny_i2v"
    pipeline = WanImageToVideoPipeline.from_pretrained(folder, dtype=torch.float32)
    t5 = T5EncoderModel.from_pretrained(trained / "assets" / "tiny_image" / "text_encoder", dtype=torch.float32)
    tokens = pipeline.tokenizer([SCENES[5].caption(video=True)], return_tensors="pt").input_ids
    assert torch.equal(pipeline.text_encoder(tokens)[0], t5(tokens)[0])
    seen: dict[str, torch.Tensor] = {}
    pipeline.transformer.register_forward_pre_hook(lambda _, __, given: seen.update(given), with_kwargs=True)
    first_BCHW = render([SCENES[5]], torch.Generator().manual_seed(0))[:, 0]
    sizes = {"height": 32, "width": 32, "num_frames": image_to_video.NUM_FRAMES, "num_inference_steps": 1}
    clip = pipeline(first_BCHW, "a red circle", **sizes, max_sequence_length=16, output_type="pt").frames
    assert clip.shape == (1, 9, 3, 32, 32) and clip.isfinite().all()
    given = image_to_video.condition(pipeline.vae, first_BCHW * 2 - 1)
    torch.testing.assert_close(seen["hidden_states"][:, -given.shape[1] :], given)
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 20e6


def test_exported_judges_load(trained: Path) -> None:
    load_clip(str(trained / "assets" / "clip"))
    load_judge(str(trained / "assets" / "judge"))


def test_training_leaves_logs(trained: Path) -> None:
    stages = {path.name for path in (trained / "work" / "logs").iterdir()}
    assert {"judge", "vae", "text", "image", "video", "clip"} <= stages


def test_second_call_trains_nothing(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = weights(trained)
    monkeypatch.setattr(L.Trainer, "fit", lambda *_, **__: pytest.fail("trained again"))
    train(trained, monkeypatch)
    assert weights(trained) == before
