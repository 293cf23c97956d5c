"""A run small enough for tests, and how its configuration is put together."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

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
    "benchmark.max_seconds=0",  # a sixth of the run, which conftest.py's finished run spends
]

config.register()


def compose_config(*overrides: str) -> DictConfig:
    """conf/config.yaml with overrides, as `run.py` gets it.

    What the choices of files alone give is composed once: Hydra needs 0.15 s for it, and hundreds of tests differ in
    values alone, which it puts on top of them just so. What it refuses is left to it.
    """
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        try:
            parsed = [_parsed(override) for override in overrides]
            values = [override for override in parsed if not _chooses_files(override)]
            choices = [str(override.input_line) for override in parsed if _chooses_files(override)]
            cfg = copy.deepcopy(_composed(*choices))
            ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
            return cfg
        except (HydraException, OmegaConfBaseException):
            return compose("config", overrides=list(overrides))


@cache
def _parsed(override: str) -> Override:
    return OverridesParser.create().parse_override(override)


def _chooses_files(override: Override) -> bool:
    name = override.key_or_group
    return override.package is not None or name.startswith("hydra") or (ROOT / "conf" / name).is_dir()


@cache
def _composed(*choices: str) -> DictConfig:
    return compose("config", overrides=list(choices))


def run_shrunk(folder: Path, cache: Path, *overrides: str) -> dict[str, Any] | None:
    """`runner.run` of the shrunk smoke experiment."""
    from viditq.runner import run

    set_aside()
    return run(compose_config(*SHRUNK, f"cache_dir='{cache}'", *overrides), folder)
