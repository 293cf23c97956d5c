"""The given picture as each pipeline shows it to its VAE, against diffusers' own resizing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.video_processor import VideoProcessor
from hydra.utils import instantiate
from PIL import Image
from zoo import conditioned, images
from zoo import videos_2026 as zoo

from viditq.models.adapter import ModelAdapter
from viditq.models.shown import as_shown
from viditq.prompt import Prompt

SHRUNK = ["name=x", "model.num_steps=2", "model.dtype=float32"]
SIZE = ["model.height=32", "model.width=48", "model.num_frames=5"]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture of noise, 40 x 64."""
    pixels = torch.randint(256, (40, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.mark.parametrize(
    ("model", "build", "own", "mode", "size"),
    [
        ("wan2.1_i2v_480p", conditioned.wan_i2v, SIZE, "default", (32, 48)),
        ("hunyuan_video15_i2v", zoo.hunyuan_video15_i2v, SIZE[2:], "crop", (12, 16)),
    ],
)
def test_as_the_pipeline_resizes_it(
    model: str, build: Any, own: list[str], mode: str, size: Any, configure: Any, folder_of: Any, picture: Path
) -> None:
    cfg = configure(f"model={model}", *SHRUNK, *own, f"model.path='{folder_of(build)}'").model
    adapter: ModelAdapter = instantiate(cfg, _convert_="all")
    (shown,) = as_shown(adapter, [Prompt("a circle", {"image": picture})])
    height, width = size
    pixels = VideoProcessor(vae_scale_factor=1, resample="lanczos").preprocess(
        Image.open(picture), height=height, width=width, resize_mode=mode
    )
    assert shown.dtype == torch.uint8 and shown.shape == (3, height, width)
    assert (shown.float() - (pixels[0] / 2 + 0.5) * 255).abs().max() <= 1


def test_a_picture_that_no_dry_call_shows(configure: Callable[..., Any], folder_of: Any, picture: Path) -> None:
    path = f"model.path='{folder_of(images.flux_dev)}'"
    adapter: ModelAdapter = instantiate(configure("model=flux_dev", "name=x", path).model, _convert_="all")
    (shown,) = as_shown(adapter, [Prompt("a circle", {"image": picture})])
    assert torch.equal(shown.movedim(0, -1), torch.from_numpy(Prompt("", {"image": picture}).pixels()["image"]))
