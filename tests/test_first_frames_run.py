"""Whole runs of clips that begin with a given picture, and runs in parts: what is judged, and what the page says."""

from __future__ import annotations

import io
import re
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from omegaconf import DictConfig
from PIL import Image

from viditq.errors import UserError
from viditq.files import read_json
from viditq.runner import run

METRICS = ["psnr", "first_frame_psnr", "first_frame_ssim", "clip_given"]
SMALL = ["model=tiny_i2v", "quant=w8a8", "name=x", f"metric=[{','.join(METRICS)}]", "model.num_steps=4", "logger=none"]
SMALL += ["data.num_prompts=3", "data.num_calibration_prompts=1", "noise_floor.num_prompts=2"]
PARTS = "stages=[prompts,reference,calibrate,quantize,generate,evaluate,report]"
WHOLE = "stages=[prompts,reference,noise_floor,calibrate,quantize,generate,evaluate,report]"
PICTURE = re.compile(r'<img src="data:image/\w+;base64,([^"]+)"[^>]*alt="given picture, which sampling starts from"')


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run and its cache."""
    return tmp_path_factory.mktemp("first frames")


def test_first_frames_from_pictures_to_page(
    folder: Path, configure: Callable[..., DictConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    cache = f"cache_dir='{folder}/cache'"
    metrics = run(configure(*SMALL, PARTS, cache), folder / "run") or {}
    assert "no noise floors, which the stage noise_floor makes" in capsys.readouterr().out
    assert metrics["noise_floor"] is None and metrics["verdict"]["psnr"]["against"] is None
    found = metrics["verdict"]["first_frame_psnr"]
    assert found["value"] > 25 and found["against"] == "float"
    assert found["difference"] == pytest.approx(found["value"] - found["float"], abs=1e-4)
    assert 80 < metrics["metrics"]["clip_given"] <= 100
    page = (folder / "run" / "report.html").read_text()
    told = read_json(folder / "run" / "per_prompt.json")
    articles = page.split("<article")[1:]
    assert len(articles) == 3 and "and from what is given, shown above them" in page
    for article in articles:
        index = int(re.search(r'aria-label="Prompt (\d+)"', article)[1])  # type: ignore[index]
        assert told["prompts"][index] in article and "<figcaption>given picture</figcaption>" in article
        for label in ("PSNR of the first frame", "SSIM of the first frame", "CLIP similarity to the given picture"):
            assert label in article
        shown = Image.open(io.BytesIO(b64decode(PICTURE.search(article)[1]))).convert("RGB")  # type: ignore[index]
        given = Image.open(told["conditions"][index]["image"]).convert("RGB")
        assert np.array_equal(np.asarray(shown), np.asarray(given))
    again = run(configure(*SMALL, WHOLE, cache), folder / "run") or {}  # judged anew against what is there by now
    assert again["noise_floor"]["num_prompts"] == 2 and again["verdict"]["psnr"]["against"] == "bfloat16"
    assert again["metrics"] == metrics["metrics"]
    assert "noise floor" in (folder / "run" / "report.html").read_text()
    capsys.readouterr()
    run(configure(*SMALL, PARTS, cache), folder / "run")
    assert "no noise floors" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[prompts,calibrate,quantize,generate,evaluate]", "evaluate takes what the stage reference makes"),
        ("[prompts,reference,calibrate,quantize,evaluate]", "evaluate takes what the stage generate makes"),
        ("[prompts,reference,noise_floor,generate]", "generate takes what the stage quantize makes"),
        ("[prompts,reference,calibrate,quantize,generate,report]", "report takes what the stage evaluate makes"),
    ],
)
def test_a_stage_that_finds_nothing_to_read_is_refused_at_the_start(
    stages: str, message: str, configure: Callable[..., DictConfig], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run(configure(*SMALL, f"stages={stages}", f"cache_dir='{tmp_path}/cache'"), tmp_path / "run")
    assert not (tmp_path / "cache" / "prompts").exists()
