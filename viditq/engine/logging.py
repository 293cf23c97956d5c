"""Loggers: what a finished run sends to W&B or to a csv file."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from viditq.engine.wandb_objects import artifact_reference, run_objects
from viditq.files import is_whole, read_json
from viditq.report.speed import speed_numbers
from viditq.run_dir import RunDir, flatten

VERDICTS = {"worse": -1, "differs": -1, "equal within noise": 0, "better": 1}  # as a number, to sort and plot by
SIZES = ("average_weight_bits", "average_activation_bits", "size_bytes", "float_size_bytes")


@rank_zero_only
def wandb_logger(
    folder: Path, name: str, group: str | None, run_id: str, project: str, entity: str | None
) -> Logger | None:
    """One W&B run per run folder; a stable id makes a repeated run continue it. Offline unless WANDB_MODE is set.

    None on every process but the first.
    """
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_SILENT", "true")
    # Begun here, not by Lightning: that passes the setting `anonymous`, at which W&B warns.
    run = wandb.init(
        name=name,
        group=group,
        id=run_id,
        dir=folder,
        project=project,
        entity=entity,
        resume="allow",
        reinit="create_new",
        settings=wandb.Settings(console="off"),
    )
    return WandbLogger(experiment=run, save_dir=folder, project=project)


def csv_logger(folder: Path, name: str, group: str | None, run_id: str) -> Logger:
    """<folder>/csv/metrics.csv"""
    return CSVLogger(folder, name="", version="csv")


def no_logger(folder: Path, name: str, group: str | None, run_id: str) -> None:
    """Log nothing."""


def log_run(logger: Logger | None, config: Mapping[str, Any], run_dir: RunDir, metrics: Mapping[str, Any]) -> None:
    """Send a finished run: configuration and numbers; to W&B also tables, plots, samples, report and artifact."""
    if logger is None:
        return
    run = logger.experiment if isinstance(logger, WandbLogger) else nullcontext()
    with run:  # finishes it, as failed after an error
        logger.log_hyperparams(flatten(config))
        logger.log_metrics(numbers(metrics) | speeds(run_dir))
        if isinstance(logger, WandbLogger):
            log_objects(run, run_dir, metrics)
    logger.save()
    logger.finalize("success")


def log_objects(run: Any, run_dir: RunDir, metrics: Mapping[str, Any]) -> None:
    """What only W&B can show."""
    if backend := metrics.get("backend"):
        run.summary.update({f"backend/{name}": count for name, count in (backend["layers"] or {}).items()})
    run.summary.update({f"verdict_text/{name}": v["verdict"] for name, v in metrics.get("verdict", {}).items()})
    with tempfile.TemporaryDirectory() as scratch, _staged_in(run_dir.path / "wandb" / "data"):
        if found := run_objects(run_dir, metrics, Path(scratch)):
            run.log(found)  # copies the scratch files
        if run_dir.artifact.is_dir():
            run.log_artifact(artifact_reference(run_dir.artifact, metrics))


@contextmanager
def _staged_in(folder: Path) -> Iterator[None]:
    """W&B keeps copies of media until they are synced: beside the run instead of in the user's home."""
    name = "WANDB_DATA_DIR"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(folder.resolve())
    try:
        yield
    finally:
        del os.environ[name]


def speeds(run_dir: RunDir) -> dict[str, float]:
    """The numbers of speed.json, where there is one."""
    found = speed_numbers(read_json(run_dir.speed)) if is_whole(run_dir.speed) else {}
    return {f"speed/{name}": value for name, value in found.items()}


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of metrics.json, flat; those that are null there are left out. Verdicts as in VERDICTS."""
    groups = {key: metrics[key] for key in ("metrics", "standard_errors", "float_metrics", "seconds")}
    verdicts = metrics.get("verdict", {})
    groups["text_encoder"] = flatten(metrics["text_encoder"]) if metrics.get("text_encoder") else {}
    groups["verdict"] = {name: VERDICTS[v["verdict"]] for name, v in verdicts.items()}
    for field in ("difference", "noise"):
        groups[field] = {name: v[field] for name, v in verdicts.items()}
    for field in ("interval", "difference_interval"):
        intervals = {name: v[field] for name, v in verdicts.items() if v[field] is not None}
        groups[field] = {
            f"{name}/{end}": v[i] for name, v in intervals.items() for i, end in enumerate(("low", "high"))
        }
    flat = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
    return {key: value for key, value in (flat | {k: metrics[k] for k in SIZES}).items() if value is not None}
