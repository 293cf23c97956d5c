"""A run small enough for tests, and how its configuration is put together."""

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from viditq import config
from viditq.memory import set_aside

ROOT = Path(__file__).parents[1]
# Two prompts and two steps (noise levels 0.999 and 0.666); batches of one, so that there is something to resume.
SHRUNK = [
    "experiment=smoke",
    "model.num_steps=2",
    "data.num_prompts=2",
    "quant.segments=[0.0,0.8,1.0]",
    "batch_size=1",
    "++model.calibration_batch_size=1",
    "logger=none",
    "noise_floor.latents=0",  # a third of what the floors cost, which one test of test_run.py spends
]

config.register()


def compose_config(*overrides: str) -> DictConfig:
    """conf/config.yaml with overrides, as `run.py` gets it."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def run_shrunk(folder: Path, cache: Path, *overrides: str) -> dict[str, Any] | None:
    """`runner.run` of the shrunk smoke experiment."""
    from viditq.runner import run

    set_aside()
    return run(compose_config(*SHRUNK, f"cache_dir='{cache}'", *overrides), folder)
