"""What became of each job of a sweep: a file per job, known whichever process ran it and whatever was killed."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from viditq.config import first_process
from viditq.errors import UserError
from viditq.files import read_json, write_json
from viditq.run_dir import fingerprint
from viditq.run_name import shorten

SWEEP_VARIABLE = "VIDITQ_SWEEP"  # the folder of the records; launchers hand it on to the processes of the jobs
_planned: list[list[str]] = []  # of the sweep of this process
HOW_MANY = ("n_trials", "max_batch_size")  # keys of a sweeper that say how many jobs, not which


@dataclass(frozen=True)
class JobRecord:
    """One job's record, `<num>.json` in the sweep's folder. `metrics` holds what metrics.json says, or is empty."""

    num: int
    overrides: list[str]
    folder: str
    status: str = "running"  # then done or failed; a job that was killed stays at running
    message: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    gate_failures: list[str] = field(default_factory=list)

    def write(self) -> None:
        """Write or replace the record; of several processes of one job only the first does."""
        if not first_process():
            return
        write_json(Path(os.environ[SWEEP_VARIABLE]) / f"{self.num:04d}.json", asdict(self))

    def failed(self, message: str) -> None:
        """Record why the job failed."""
        replace(self, status="failed", message=message).write()

    def interrupted(self, by: str) -> None:
        """Record what stopped the job; it stays at running, as after a kill."""
        replace(self, message=f"interrupted by {by}").write()

    def done(self, metrics: Mapping[str, Any] | None, gate_failures: Sequence[str] = ()) -> None:
        """Record what the job measured, if it got so far, and the gates it failed."""
        replace(self, status="done", metrics=dict(metrics or {}), gate_failures=list(gate_failures)).write()


class SweepFolder(Callback):
    """Hydra callback that says, before the first job starts, where the records of this sweep lie."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        os.environ[SWEEP_VARIABLE] = str(sweep_folder(config.hydra))
        _planned[:] = _jobs_of(config.hydra)


def sweep_folder(hydra: DictConfig) -> Path:
    """`<sweep dir>/_sweeps/<hash of what is swept>`: the same sweep through another launcher has the same folder."""
    sweeper = OmegaConf.to_container(hydra.sweeper)
    assert isinstance(sweeper, dict)
    what = {str(key): value for key, value in sweeper.items() if key not in HOW_MANY}
    overrides = [text for text in hydra.overrides.task if not text.startswith("launcher=")]
    key = {"overrides": overrides, "sweeper": what}
    return Path(hydra.sweep.dir).resolve() / "_sweeps" / fingerprint(key)


def planned_jobs() -> list[list[str]]:
    """The overrides of each job of this process's sweep, in order, begun or not; empty where that is not known."""
    return [*_planned]


def _jobs_of(hydra: DictConfig) -> list[list[str]]:
    """As Hydra's sweeper, and with it ours for grids, will deal them out; a tuning makes up its own one by one."""
    with suppress(Exception):  # what is wrong is for the sweeper to say
        params: Any = hydra.sweeper.get("params") or {}
        swept = "experiment" in params  # the sweep itself, which the command line chooses, is none of its jobs
        given = [text for text in hydra.overrides.task if not (swept and text.startswith("experiment="))]
        if "n_trials" in hydra.sweeper:
            return [[*given, f"trial {number}"] for number in range(hydra.sweeper.n_trials)]
        words = [f"{key}={value}" for key, value in params.items()] + given
        (jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(words), None)
        return jobs
    return []


def current_job(folder: Path) -> JobRecord | None:
    """The job of a sweep that this process runs now, its record begun; None if this is a single run."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    hydra = HydraConfig.get()
    job = JobRecord(int(hydra.job.num), list(hydra.overrides.task), str(folder))
    job.write()
    return job


def read_jobs(folder: Path) -> list[JobRecord]:
    """Every job recorded in a sweep's folder, in order. Raises UserError for a file that is no such record."""
    return [_read_job(path) for path in sorted(folder.glob("[0-9]*.json"))]


def _read_job(path: Path) -> JobRecord:
    try:
        return JobRecord(**read_json(path, "Delete it and run the sweep again."))
    except TypeError as error:  # no mapping, or other keys
        remedy = "If this is the folder of a sweep, delete the file and run the sweep again."
        raise UserError(f"{path} is no record of a job. {remedy}") from error


def exit_status(jobs: list[JobRecord] | None) -> int:
    """0 if every job is done, 2 if one failed, was killed or is not known, 3 if all that went wrong is gates."""
    if jobs is None or any(job.status != "done" for job in jobs):
        return 2
    return 3 if any(job.gate_failures for job in jobs) else 0


def distinct_overrides(jobs: Sequence[Sequence[str]]) -> tuple[str, list[str]]:
    """What the overrides of all jobs share, and what sets each apart."""
    common = [o for o in jobs[0] if all(o in job for job in jobs)] if len(jobs) > 1 else []
    apart = [" ".join(o for o in job if o not in common) for job in jobs]
    return shorten(" ".join(common), 300), apart
