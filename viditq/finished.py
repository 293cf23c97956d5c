"""Whether a run that was finished still is, told from stat alone: before torch, Lightning and diffusers are imported.

A run that is through leaves `finished.json`: what each stage says when nothing is left to do, and the size and times of
every file that says so. While all of that and all that it was made by is unchanged, there is nothing to look into.
Anything else, however harmless, is a doubt, and in doubt the run looks for itself what is left to do.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from viditq.config import RANKS, only_estimates
from viditq.engine.wandb_settings import of_sweep
from viditq.files import lock, write_json
from viditq.provenance import versions
from viditq.run_dir import BEFORE_CONFIG, RunDir

RECORD = "finished.json"
TOLD_ANEW = ("stages", "gate")  # keys that may differ: which of the stages to tell of, what to hold the numbers against
OF_LOGGERS = ("wandb", "csv", "tensorboard", "mlflow")  # folders in that of the run which no stage reads
PACKAGE = Path(__file__).parent
Stamp = list[int]
"""Size, time of the last change of content and of the last change at all (which no touching sets back), in ns."""


class Doubt(Exception):
    """Something is not as it was recorded."""


@dataclass(frozen=True)
class Finished:
    """The content of the record.

    made_by: configuration, versions and place. heading: what the run says first; stages: stage -> what it says when it
    is done. folders: those of the run and of the model -> their files, of which there may be no others; files: others
    that stages have made or read.
    """

    made_by: Mapping[str, Any]
    heading: Sequence[str]
    stages: Mapping[str, str]
    folders: Mapping[str, Mapping[str, Stamp]]
    files: Mapping[str, Stamp]


def write_finished(
    cfg: DictConfig,
    run_dir: RunDir,
    heading: Sequence[str],
    stages: Mapping[str, str],
    folders: Iterable[Path],
    read: Iterable[Path],
    left: Iterable[Path],
    since: int,
) -> None:
    """Record a run in which every one of `stages` has nothing left to do.

    folders, read: those of the model and other files that the run has read, from `since` on (Checked.since): raises
    Doubt where one has changed meanwhile. left: files outside of the run's folder that stages have made.
    """
    of_model = {str(folder): stamps_in(folder) for folder in folders}
    given = {str(file): stamp(file) for file in read}
    for _, _, changed in [*given.values(), *(one for stamps in of_model.values() for one in stamps.values())]:
        if changed >= since:
            raise Doubt
    files = given | {str(file): stamp(file) for file in left}
    mine = {str(run_dir.path): stamps_of_run(run_dir.path)}
    record = Finished(made_by(cfg, run_dir.path), heading, stages, mine | of_model, files)
    if _read(run_dir.path) != record:
        write_json(run_dir.path / RECORD, asdict(record))


def find_finished(cfg: DictConfig, folder: Path, stages: Sequence[str]) -> Finished | None:
    """The record of the run in `folder`, if all of these stages are done beyond doubt; None = look for yourself."""
    if only_estimates(cfg) or any(name in os.environ for name in RANKS):
        return None  # one of several processes looks with the others
    if of_sweep() and cfg.logger and str(cfg.logger.get("_target_")).endswith(".wandb_logger"):
        return None  # the trial waits for its numbers
    with suppress(OSError, AttributeError, TypeError, Doubt):  # a file is gone, or the record holds something else
        if record := _read(folder):
            with lock(folder, _busy):
                _check(record, cfg, folder, stages)
        return record
    return None


def _read(folder: Path) -> Finished | None:
    with suppress(OSError, ValueError, TypeError):
        return Finished(**json.loads((folder / RECORD).read_text()))
    return None


def _check(record: Finished, cfg: DictConfig, folder: Path, stages: Sequence[str]) -> None:
    """Raises Doubt, or OSError for a file that is not there any more, where the record does not hold."""
    if record.made_by != made_by(cfg, folder) or any(stage not in record.stages for stage in stages):
        raise Doubt
    for name, known in record.folders.items():
        path = Path(name)
        if known != (stamps_of_run(path) if path == folder else stamps_in(path)):
            raise Doubt
    if any(known != stamp(name) for name, known in record.files.items()):
        raise Doubt


def _busy() -> None:
    raise Doubt


def made_by(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """What decides what a run would do, but for the content of files: configuration, versions, code, places."""
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    tracked = {str(key): value for key, value in values.items() if key not in TOLD_ANEW}
    places = {"folder": str(folder.resolve()), "from": str(Path.cwd())}
    plain: dict[str, Any] = json.loads(json.dumps(tracked, default=str))
    return {"config": plain, "versions": versions(), "code": _code(), **places}


def _code() -> str:
    """Hash of the names, sizes and times of this package's sources: a changed checkout is another version."""
    sources = {str(path.relative_to(PACKAGE)): stamp(path) for path in sorted(PACKAGE.rglob("*.py"))}
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:16]


def stamp(path: Path | str) -> Stamp:
    """Of one file; raises OSError where there is none."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def stamps_in(folder: Path, but: Sequence[str] = ()) -> dict[str, Stamp]:
    """Name below `folder` -> the file's stamp, for all files. but: patterns of entries of the folder itself."""
    tops = [path for path in folder.iterdir() if not any(map(path.match, but))]
    below = [path for top in tops if top.is_dir() for path in top.rglob("*")]
    return {str(path.relative_to(folder)): stamp(path) for path in sorted([*tops, *below]) if not path.is_dir()}


def stamps_of_run(folder: Path) -> dict[str, Stamp]:
    """The same of a run's folder, but for what Hydra and loggers write there, and the record."""
    return stamps_in(folder, but=[*(name for name in BEFORE_CONFIG if name != "*.tmp"), *OF_LOGGERS, RECORD])
