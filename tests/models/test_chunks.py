"""A clip made chunk by chunk (AnyFlow-FAR): streams without tokens, a cache, calls that predict nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from zoo import guessed_videos

from viditq.files import read_json
from viditq.runner import run

SHRUNK = [
    *("name=x", "model=diffusers", "model.num_steps=2", "model.height=32", "model.width=32", "model.num_frames=9"),
    *("+model.call.chunk_partition=[1,1,1]", "data=prompt_file", "data.num_prompts=1", "metric=[psnr]", "logger=none"),
    *("data.num_calibration_prompts=2", "noise_floor.num_prompts=0", "diagnosis.num_prompts=1"),
]
STAGES = "stages=[prompts,reference,calibrate,{}quantize,generate,diagnose,evaluate]"
TREATMENTS = ["quant/policy=treatments", "quant.policy.held_out=1", "quant.policy.step_prompts=1"]
QUANT = {
    "adaround": ["quant=w4a8", "quant/rounding=adaround"],
    "ptqd_mean": ["quant=w4a8", "quant.correction=ptqd_mean"],
    "sensitivity": ["quant=w4a8", "quant/policy=sensitivity"],
    "treatments": ["quant=none", *TREATMENTS, "quant.policy.budget.size=120000"],
}


# slow: whole runs, each through another stage that calls the denoiser again; tests/quant has each by itself
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in QUANT])
def test_a_whole_run(kind: str, configure: Callable[..., Any], folder_of: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a small red circle\na large blue square\na red circle\n")
    paths = [f"model.path='{folder_of(guessed_videos.anyflow_far)}'", f"data.path='{tmp_path}/prompts.txt'"]
    stages = STAGES.format("search," if "policy" in " ".join(QUANT[kind]) else "")
    cfg = configure(*SHRUNK, *paths, stages, *QUANT[kind], f"cache_dir='{tmp_path}/cache'")
    metrics = run(cfg, tmp_path / "run")
    assert metrics is not None and 20 < metrics["metrics"]["psnr"] < 100
    errors = read_json(tmp_path / "run" / "errors.json")
    assert all(0 < layer["total"] < 0.5 for layer in errors["layers"].values())
    told = [error for error in errors["denoiser"]["relative_error"] if error is not None]
    assert told and all(0 < error < 0.5 for error in told)
