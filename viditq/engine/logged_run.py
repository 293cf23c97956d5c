"""What a run sends to its logger: where it is while it runs, and at its end numbers, tables and pictures."""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image

from viditq.engine.logging import staged_in
from viditq.engine.progress import Progress
from viditq.engine.wandb_objects import artifact_reference, run_objects
from viditq.errors import UserError
from viditq.files import is_whole, read_json
from viditq.report.speed import speed_numbers
from viditq.run_dir import RunDir, flatten

VERDICTS = {"worse": -1, "differs": -1, "equal within noise": 0, "better": 1}  # as a number, to sort and plot by
SIZES = ("average_weight_bits", "average_activation_bits", "size_bytes", "float_size_bytes")
SECONDS = 2.0  # at least, between two messages of where a run is
FAILED, MENDABLE = 1, 2  # exit codes: a bug, and what a user can mend, as the command's own


class LoggedRun:
    """A run and its logger, from the first stage on."""

    def __init__(self, logger: Logger) -> None:
        self.logger = logger
        self._stage, self._next, self._step = "", 0.0, 0

    def begin(self, config: Mapping[str, Any], tags: Sequence[str]) -> None:
        """Send what it is."""
        logger = self.logger
        if isinstance(logger, WandbLogger):
            run = logger.experiment
            run.config.update(dict(config), allow_val_change=True)  # nested: W&B shows it as keys with dots
            run.tags = tuple(dict.fromkeys([*(run.tags or ()), *tags]))
            for key in ("progress/*", "sampling/*"):
                run.define_metric(key, summary="none")
        else:
            logger.log_hyperparams(dict(config))
            if isinstance(logger, MLFlowLogger):
                logger.experiment.set_tag(logger.run_id, "tags", ", ".join(tags))

    def tell(self, progress: Progress) -> None:
        """Send where the run is: at each stage, and within one every SECONDS."""
        now = time.monotonic()
        if progress.stage == self._stage and progress.share < 1 and now < self._next:
            return
        values = {"progress/stage": float(progress.number)}
        if progress.share:
            values[f"sampling/{progress.stage}"] = progress.share
        if (left := progress.left()) is not None:
            values["progress/minutes_left"] = left / 60
        if progress.stage != self._stage and isinstance(self.logger, WandbLogger):
            self.logger.experiment.summary["stage"] = progress.stage
        self._stage, self._next, self._step = progress.stage, now + SECONDS, self._step + 1
        self.logger.log_metrics(values, step=None if isinstance(self.logger, WandbLogger) else self._step)

    def send(self, run_dir: RunDir, metrics: Mapping[str, Any]) -> None:
        """Send what a reported run has found."""
        found = numbers(metrics) | speeds(run_dir)
        if isinstance(self.logger, WandbLogger):
            self.logger.log_metrics(found)
            log_objects(self.logger.experiment, run_dir, metrics)
        else:
            self.logger.log_metrics(found, step=self._step + 1 if self._step else None)
            log_pictures(self.logger, run_dir)
        self.logger.save()

    def end(self, exit_code: int) -> None:
        """The last word: 0 = the run is through."""
        if isinstance(self.logger, WandbLogger):
            if not exit_code:
                self.logger.experiment.summary["stage"] = "done"
            self.logger.experiment.finish(exit_code=exit_code)
        else:
            self.logger.finalize("failed" if exit_code else "success")


def follows(logger: Logger | None) -> bool:
    """Whether the logger is to see the run from its start; a csv file holds results alone."""
    return logger is not None and not isinstance(logger, CSVLogger)


@contextmanager
def logged(logger: Logger | None, config: Mapping[str, Any], tags: Sequence[str] = ()) -> Iterator[LoggedRun | None]:
    """A run begins, and ends with the block: as failed where that raises. None where there is no logger."""
    if logger is None:
        yield None
        return
    run, code = LoggedRun(logger), FAILED
    try:
        run.begin(config, tags)
        yield run
        code = 0
    except SystemExit as error:  # Ctrl-C, SIGTERM
        code = error.code if isinstance(error.code, int) else FAILED
        raise
    except UserError:
        code = MENDABLE
        raise
    finally:
        run.end(code)


def log_objects(run: Any, run_dir: RunDir, metrics: Mapping[str, Any]) -> None:
    """What only W&B can show."""
    if backend := metrics.get("backend"):
        run.summary.update({f"backend/{name}": count for name, count in (backend["layers"] or {}).items()})
    run.summary.update({f"{name}/verdict_text": v["verdict"] for name, v in metrics.get("verdict", {}).items()})
    with tempfile.TemporaryDirectory() as scratch, staged_in(run_dir.path / "wandb" / "data"):
        if found := run_objects(run_dir, metrics, Path(scratch)):
            run.log(found)  # copies the scratch files
        if run_dir.artifact.is_dir():
            run.log_artifact(artifact_reference(run_dir.artifact, metrics))


def log_pictures(logger: Logger, run_dir: RunDir) -> None:
    """The comparison, and the page where files are taken as they are."""
    if isinstance(logger, MLFlowLogger):
        moving = run_dir.picture.with_suffix(".gif")
        for file in (run_dir.picture, moving, run_dir.page, run_dir.metrics):
            if file.is_file():
                logger.experiment.log_artifact(logger.run_id, str(file))
    if isinstance(logger, TensorBoardLogger) and run_dir.picture.is_file():
        with Image.open(run_dir.picture) as picture:
            logger.experiment.add_image("comparison", np.asarray(picture.convert("RGB")), dataformats="HWC")


def speeds(run_dir: RunDir) -> dict[str, float]:
    """The numbers of speed.json, where there is one."""
    found = speed_numbers(read_json(run_dir.speed)) if is_whole(run_dir.speed) else {}
    return {f"speed/{name}": value for name, value in found.items()}


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of metrics.json, each metric's under its name; those that are null there are left out. Verdicts as in
    VERDICTS.
    """
    found: dict[str, Any] = {}
    for field, group in (("value", "metrics"), ("standard_error", "standard_errors"), ("float", "float_metrics")):
        found |= {f"{name}/{field}": value for name, value in metrics[group].items()}
    for name, verdict in metrics.get("verdict", {}).items():
        found[f"{name}/verdict"] = VERDICTS[verdict["verdict"]]
        found |= {f"{name}/{field}": verdict[field] for field in ("difference", "noise")}
        for field in ("interval", "difference_interval"):
            ends = zip(("low", "high"), verdict[field] or (None, None), strict=True)
            found |= {f"{name}/{field}_{end}": value for end, value in ends}
    found |= {f"seconds/{stage}": value for stage, value in metrics["seconds"].items()}
    if metrics.get("text_encoder"):
        found |= {f"text_encoder/{key}": value for key, value in flatten(metrics["text_encoder"]).items()}
    found |= {f"denoiser/{key}": metrics[key] for key in SIZES}
    return {key: value for key, value in found.items() if value is not None}
