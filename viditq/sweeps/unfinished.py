"""Folders that hold no finished run: which of them work now, which were stopped, and how those go on."""

import re
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from viditq.config import OUTPUTS, program
from viditq.errors import UserError
from viditq.files import is_held
from viditq.provenance import alone
from viditq.run_dir import CONFIG, overrides_of

PLACES = ("hydra.run.dir=", "hydra.sweep.")  # overrides that choose where a run lies
PLAIN = re.compile(r"[\w./+-]+")  # what needs no quotes in an override
MEASURES = "evaluate"  # the stage that leaves what runs are compared by


def is_begun(folder: Path) -> bool:
    """Whether a run lies there, finished or not."""
    return (folder / CONFIG).is_file()


def why_left_out(folder: Path) -> str:
    """What a line says of a folder without a finished run: what it is, and what to do about it."""
    if not is_begun(folder):
        return f"{folder} holds no run (no {CONFIG})"
    if is_held(folder):
        return f"{folder} is running now, and counts when it is through"
    if stages := _stages_without_measuring(folder):
        return f"{folder} measured nothing: its command has {stages}, without {MEASURES}"
    return f"{folder} is unfinished and not running: stopped, or failed. Go on with: {command_of(folder)}"


def command_of(folder: Path) -> str:
    """The command that goes on with a run; where it lies in `outputs` of another folder, that is told too."""
    whole, words = folder.absolute(), [*program(), *_overrides(folder), *alone(_of_hydra(folder, "sweeper"))]
    chosen = any(str(word).startswith(PLACES) for word in _of_hydra(folder, "overrides").get("hydra") or ())
    if whole.parents[1].name == OUTPUTS and not chosen:
        started = whole.parents[2]
        return shlex.join(words) + f" (in {started})" * (started != Path.cwd())
    place = shown(folder)
    return shlex.join([*words, "hydra.run.dir=" + (place if PLAIN.fullmatch(place) else f'"{place}"')])


def shown(path: Path) -> str:
    """Seen from the current folder if it lies below it."""
    whole, here = path.absolute(), Path.cwd()
    return str(whole.relative_to(here)) if whole.is_relative_to(here) else str(path)


def _of_hydra(folder: Path, node: str) -> dict[str, Any]:
    """A node of what Hydra has kept of the latest command there; empty where that is gone, or damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return dict(yaml.safe_load((folder / "hydra" / "hydra.yaml").read_text())["hydra"][node])
    return {}


def _overrides(folder: Path) -> list[str]:
    """The words of the command that made the run, or of a later one that has other stages and is the same else."""
    try:
        first = overrides_of(folder)
    except UserError:  # a damaged file, which the run itself refuses
        return []
    latest = [str(word) for word in _of_hydra(folder, "overrides").get("task") or ()]
    return latest if _but_stages(latest) == _but_stages(first) else first


def _but_stages(words: list[str]) -> list[str]:
    return [word for word in words if _key(word) != "stages"]


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")


def _stages_without_measuring(folder: Path) -> str:
    """`stages=[...]` of the command line where it leaves out what measures; else empty."""
    given = [word for word in _overrides(folder) if _key(word) == "stages"]
    return given[-1] if given and MEASURES not in given[-1] else ""
