"""The root schema of the configuration: unknown or mistyped top-level keys fail when the config is composed."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

STAGES = ("prompts", "reference", "calibrate", "quantize", "generate", "evaluate", "report")
COMMAND_VARIABLE = "VIDITQ_COMMAND"  # the command line; launchers hand it on to processes with an argv of their own


@dataclass
class CalibrationConfig:
    """Statistics: buckets of noise level, and input rows kept per bucket for choosing alpha."""

    num_buckets: int = 20
    rows_per_bucket: int = 16


@dataclass
class RootConfig:
    """Everything one run needs; below the nodes typed Any, every object's constructor refuses unknown keys."""

    name: str = MISSING
    seed: int = 0
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    batch_size: int = 8
    cache_dir: str = "outputs/_cache"
    debug: bool = False
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    model: Any = MISSING
    quant: Any = MISSING
    data: Any = MISSING
    metric: Any = MISSING
    backend: str = "fake"
    trainer: Any = MISSING
    logger: Any = None


def run_name(name: str, overrides: str) -> str:
    """Folder name of a run: its name, then the command line's other overrides (hashed when too long for a file)."""
    parts = [part for part in overrides.split(",") if part and part != f"quant={name}"]
    return shorten(",".join([name, *parts]).replace("/", "."), 150)


def shorten(text: str, limit: int) -> str:
    """`text` if it fits, else its beginning and a hash of it all."""
    return text if len(text) <= limit else f"{text[: limit - 13]}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def register() -> None:
    """Make the schema and the resolver known to Hydra."""
    ConfigStore.instance().store(name="schema", node=RootConfig)
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
