"""scripts/bench.py: what it runs, and the bytes that each search gets."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from omegaconf import DictConfig

from viditq.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench", ROOT / "scripts/bench.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def outputs(bench: ModuleType, tmp_path: Path) -> Path:
    """Runs of every recipe that a search takes its bytes from; those of seed 1 are smaller."""
    for best in (one for sweeps in bench.SWEEPS.values() for one in sweeps if isinstance(one, bench.Best)):
        for seed in (0, 1):
            words = [f"bits={best.bits}"] * bool(best.bits) + [f"seed={seed}"]
            folder = tmp_path / "tiny_image" / "-".join([best.recipe, *words])
            folder.mkdir(parents=True, exist_ok=True)
            files: dict[str, Any] = {
                "run.json": {"name": best.recipe, "seed": seed, "overrides": words},
                "per_prompt.json": {},
            }
            files["metrics.json"] = {"size_bytes": 2_191_234 - 2000 * seed + 10_000 * len(best.bits)}
            for name, content in files.items():
                (folder / name).write_text(json.dumps(content))
    return tmp_path


def first_job(overrides: list[str]) -> list[str]:
    """Of a sweep, without what Hydra itself takes."""
    chosen = [text if "[" in text else text.partition(",")[0] for text in overrides]
    return [text for text in chosen if not text.startswith("hydra.")]


def test_every_sweep_composes(bench: ModuleType, outputs: Path, configure: Callable[..., DictConfig]) -> None:
    for part in bench.SWEEPS:
        for overrides in bench.commands("tiny_image", part, [0, 1], outputs):
            cfg = configure(*first_job(overrides))
            assert cfg.data.num_prompts == 32 and cfg.model.name == "tiny_image" and "report" not in cfg.stages
            assert "seed=0,1" in overrides and f"hydra.sweep.dir={outputs}" in overrides
    assert "data.num_prompts=16" in next(bench.commands("tiny_video_hard", "methods", [0], outputs))


def test_a_search_gets_at_most_the_bytes_of_every_seed(bench: ModuleType, outputs: Path) -> None:
    overrides = bench.Best("q_dit", "w4a8").overrides(outputs / "tiny_image", [0, 1])
    assert "quant.policy.budget.size=2220000" in overrides and "name=best_q_dit_w4a8" in overrides
    assert "quant.policy.budget.size=2180000" in bench.Best("w8", "", 16).overrides(outputs / "tiny_image", [0, 1])
    with pytest.raises(UserError, match="has no run of q_dit w4a8 with seed 2: run the parts before"):
        bench.Best("q_dit", "w4a8").overrides(outputs / "tiny_image", [0, 1, 2])
