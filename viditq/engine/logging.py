"""Loggers: what a finished run sends to W&B or to a csv file."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from viditq.run_dir import RunDir, flatten


def wandb_logger(folder: Path, name: str, group: str | None, run_id: str, project: str, entity: str | None) -> Logger:
    """One W&B run per run folder; a stable id makes a repeated run continue it. Offline unless WANDB_MODE is set."""
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    return WandbLogger(
        name=name, group=group, id=run_id, save_dir=folder, project=project, entity=entity, resume="allow"
    )


def csv_logger(folder: Path, name: str, group: str | None, run_id: str) -> Logger:
    """<folder>/csv/metrics.csv"""
    return CSVLogger(folder, name="", version="csv")


def no_logger(folder: Path, name: str, group: str | None, run_id: str) -> None:
    """Log nothing."""


def log_run(logger: Logger | None, config: Mapping[str, Any], run_dir: RunDir, metrics: Mapping[str, Any]) -> None:
    """Send configuration, metrics and pictures of a finished run."""
    if logger is None:
        return
    logger.log_hyperparams(flatten(config))
    numbers = {f"metrics/{k}": v for k, v in metrics["metrics"].items() if v is not None}
    numbers |= {f"standard_errors/{k}": v for k, v in metrics["standard_errors"].items() if v is not None}
    numbers |= {f"float_metrics/{k}": v for k, v in metrics["float_metrics"].items() if v is not None}
    numbers |= {f"seconds/{k}": v for k, v in metrics["seconds"].items()}
    keys = ("average_weight_bits", "average_activation_bits", "size_bytes", "float_size_bytes")
    logger.log_metrics(numbers | {k: metrics[k] for k in keys})
    if isinstance(logger, WandbLogger) and run_dir.picture.is_file():
        logger.log_image("comparison", [str(run_dir.picture)])
    logger.save()
    logger.finalize("success")
    if isinstance(logger, WandbLogger):
        logger.experiment.finish()
