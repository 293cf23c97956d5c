"""Lightning's loggers as a run begins them: W&B, MLflow, TensorBoard, a csv file, or none."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from viditq.engine.logger_packages import check_package
from viditq.engine.wandb_settings import default_mode, of_sweep
from viditq.errors import UserError

RUN_ID = "id"  # file in <run>/wandb or <run>/mlflow: which run of that service the folder is


@rank_zero_only
def wandb_logger(
    folder: Path, name: str, group: str | None, run_id: str, project: str, entity: str | None
) -> Logger | None:
    """One W&B run per run folder, which a command that resumes goes on with. Offline unless WANDB_MODE is set.

    In a sweep of W&B the agent says which run, project and entity. None on every process but the first. Raises
    UserError where W&B cannot begin.
    """
    os.environ.setdefault("WANDB_MODE", default_mode())
    os.environ.setdefault("WANDB_SILENT", "true")
    where: dict[str, Any] = {}
    if not of_sweep():
        where = {"id": _wandb_id(folder, run_id), "project": project, "entity": entity, "resume": "allow"}
    # Begun here, not by Lightning: that passes the setting `anonymous`, at which W&B warns.
    try:
        run = wandb.init(
            name=name, group=group, dir=folder, reinit="create_new", settings=wandb.Settings(console="off"), **where
        )
    except (wandb.errors.CommError, wandb.errors.UsageError) as error:
        raise UserError(
            f"W&B cannot begin the run: {str(error).rstrip('.')}. With WANDB_MODE=offline it is kept in the run's "
            "folder, for `wandb sync` later; logger=none leaves W&B out."
        ) from error
    return WandbLogger(experiment=run, save_dir=folder, project=project)


def _wandb_id(folder: Path, before: str) -> str:
    """The id that the folder keeps, a new one for a new folder; before: the one that earlier versions gave it."""
    kept = folder / "wandb" / RUN_ID
    if not kept.is_file():
        earlier = any((folder / "wandb").glob(f"*run-*-{before}"))
        _keep(kept, before if earlier else f"{before[:8]}{secrets.token_hex(4)}")
    return kept.read_text().strip()


def _keep(file: Path, value: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(value)


@rank_zero_only
def tensorboard_logger(folder: Path, name: str, group: str | None, run_id: str) -> Logger | None:
    """<folder>/tensorboard: `tensorboard --logdir outputs` shows the runs beside each other.

    None on every process but the first. Raises UserError where TensorBoard is not installed.
    """
    check_package("tensorboard_logger")
    return TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False)


@rank_zero_only
def mlflow_logger(
    folder: Path, name: str, group: str | None, run_id: str, project: str, tracking_uri: str | None
) -> Logger | None:
    """One MLflow run per run folder, which a command that resumes goes on with; project: MLflow's experiment.

    tracking_uri: null = what MLFLOW_TRACKING_URI says, else a database in the run's folder. None on every process but
    the first. Raises UserError where MLflow is not installed, or its server cannot be reached.
    """
    check_package("mlflow_logger")
    place = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    kept = folder / "mlflow" / RUN_ID
    kept.parent.mkdir(exist_ok=True)
    known = kept.read_text().strip() if kept.is_file() else None
    try:
        logger = MLFlowLogger(
            experiment_name=project,
            run_name=name,
            tracking_uri=place or f"sqlite:///{(kept.parent / 'mlflow.db').resolve()}",
            tags={"group": group} if group else None,
            artifact_location=None if place else (kept.parent / "artifacts").resolve().as_uri(),
            run_id=known,
        )
        _keep(kept, str(logger.run_id))  # asks the server
    except Exception as error:
        if not type(error).__module__.startswith("mlflow"):
            raise
        raise UserError(
            f"MLflow cannot begin the run at {place or kept.parent}: {error}. logger.tracking_uri=URI says where else; "
            "logger=none leaves MLflow out."
        ) from error
    return logger


def csv_logger(folder: Path, name: str, group: str | None, run_id: str) -> Logger:
    """<folder>/csv/metrics.csv"""
    return CSVLogger(folder, name="", version="csv")


def no_logger(folder: Path, name: str, group: str | None, run_id: str) -> None:
    """Log nothing."""


@contextmanager
def staged_in(folder: Path) -> Iterator[None]:
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
