"""The objects of one run, built from the configuration and checked before any slow work starts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from torchmetrics import Metric

from viditq.config import STAGES
from viditq.data.prompts import PromptData
from viditq.errors import UserError
from viditq.models.adapter import ModelAdapter
from viditq.quant.backends import get_backend
from viditq.quant.setting import QuantSetting

# Keys that change neither samples nor numbers, so that a run may be continued with others.
UNTRACKED = ("stages", "trainer", "logger", "debug", "cache_dir", "batch_size")


@dataclass(frozen=True)
class Experiment:
    """Everything a stage needs; `tracked` is the configuration that determines the results."""

    name: str
    seed: int
    batch_size: int
    num_buckets: int
    rows_per_bucket: int
    backend: str
    stages: tuple[str, ...]
    cache_dir: Path
    adapter: ModelAdapter
    quant: QuantSetting
    data: PromptData
    make_metrics: Callable[[], dict[str, Metric]]
    make_trainer: Callable[[], L.Trainer]
    make_logger: Callable[[Path], Any] | None
    tracked: Mapping[str, Any]


def build(cfg: DictConfig) -> Experiment:
    """Instantiate the configuration; raises UserError (or Hydra's own message) for anything that cannot work."""
    stages = _stages(cfg.stages)
    for name in ("batch_size", "seed"):
        if cfg[name] < (1 if name == "batch_size" else 0):
            raise UserError(f"{name}={cfg[name]} is too small.")
    get_backend(cfg.backend)
    tracked = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(tracked, dict)
    experiment = Experiment(
        name=cfg.name,
        seed=cfg.seed,
        batch_size=cfg.batch_size,
        num_buckets=cfg.calibration.num_buckets,
        rows_per_bucket=cfg.calibration.rows_per_bucket,
        backend=cfg.backend,
        stages=stages,
        cache_dir=Path(cfg.cache_dir),
        adapter=instantiate(cfg.model, _convert_="all"),
        quant=instantiate(cfg.quant, _convert_="all"),
        data=instantiate(cfg.data, _convert_="all"),
        make_metrics=lambda: instantiate(cfg.metric, _convert_="all"),
        make_trainer=lambda: _trainer(cfg.trainer),
        make_logger=instantiate(cfg.logger, _partial_=True, _convert_="all") if cfg.logger else None,
        tracked={str(k): v for k, v in tracked.items() if k not in UNTRACKED},
    )
    experiment.make_trainer()
    return experiment


def _stages(wanted: Any) -> tuple[str, ...]:
    for stage in wanted:
        if stage not in STAGES:
            raise UserError(f"Unknown stage {stage!r}. Stages are {', '.join(STAGES)}.")
    return tuple(stage for stage in STAGES if stage in wanted)


def _trainer(node: Any) -> L.Trainer:
    try:
        trainer = instantiate(node, _convert_="all")
    except Exception as error:
        cause = error.__cause__
        if isinstance(cause, MisconfigurationException | ValueError | TypeError):
            raise UserError(f"The trainer settings {dict(node)} cannot work: {cause}") from error
        raise
    if trainer.world_size != 1:
        raise UserError(f"trainer.devices={node.devices}: one process per run for now; give 1 and use -m for sweeps.")
    return trainer
