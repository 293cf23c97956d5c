"""The folder `PLACE.partial` in which something grows that is put in its place when it is whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from viditq.errors import UserError
from viditq.files import LOCK, is_whole, lock, read_json, remove_temporary, write_json

KEY = "key.json"


def work_folder(place: Path) -> Path:
    """Where `place` grows."""
    return place.with_name(f"{place.name}.partial")


def resume(work: Path, key: Any) -> None:
    """What a killed writer left under the same key stays in `work`; what was made under another key is deleted.

    key: JSON of what decides the content. Raises UserError where `work` is no folder of ours.
    """
    key = json.loads(json.dumps(key))
    _check_ours(work)
    if work.exists() and not (is_whole(work / KEY) and read_json(work / KEY) == key):
        for path in (path for path in work.iterdir() if path.name != LOCK):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if not (work / KEY).exists():
        write_json(work / KEY, key)


@contextmanager
def held(work: Path) -> Iterator[None]:
    """Only this process writes to `work`, from which what killed ones had open is gone.

    Raises UserError where another one holds it, or it is no folder of ours.
    """

    def busy() -> NoReturn:
        raise UserError(f"{work} is being written by another process. Wait for it, or give another --out.")

    _check_ours(work)
    with lock(work, busy):
        remove_temporary(work)
        yield


def end(work: Path) -> None:
    """Remove from `work` what is of no use in its place."""
    for name in (KEY, LOCK):
        (work / name).unlink(missing_ok=True)


def _check_ours(work: Path) -> None:
    """A folder that was just begun may have no key yet."""
    begun = not work.is_symlink() and work.is_dir()
    if begun and ((work / KEY).exists() or all(path.name[0] == "." for path in work.iterdir())):
        return
    if work.exists() or work.is_symlink():
        raise UserError(f"{work} is where viditq would write, and is not of viditq. Move it, or give another --out.")
