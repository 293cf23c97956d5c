"""Files that are either whole or absent: written under a temporary name, then renamed; and locks on folders."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from viditq.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

AGAIN = "Delete it and run the command again."
UMASK = os.umask(0)  # can only be read by setting it
os.umask(UMASK)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it on success, remove it on failure. UserError if `path` names
    no file.
    """
    if not path.name:
        raise UserError(f"{path} is a folder; give the name of a file in it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if temporary.is_file():
            temporary.chmod(0o666 & ~UMASK)  # safetensors makes files that their owner alone can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON (NaN and infinity are refused)."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file."""
    from safetensors.torch import save_file  # torch takes a second, which a refused command line does not pay

    with atomic(path) as temporary:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata=metadata)


def read_json(path: Path, remedy: str = AGAIN) -> Any:
    """The values of a JSON file; raises UserError if it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged ({error}). {remedy}") from error


def digest_of(paths: Sequence[Path], folder: Path | None = None) -> str:
    """Hash of files in their order: names (in `folder`), sizes, and the first and last MiB of each."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.relative_to(folder) if folder else path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def read_mapping(path: Path, keys: Sequence[str] = (), remedy: str = AGAIN) -> dict[str, Any]:
    """The values of a JSON file that holds these keys; raises UserError if it is missing or damaged, or lacks one."""
    values = read_json(path, remedy)
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it holds {type(values).__name__}, not names and values. {remedy}")
    if absent := [key for key in keys if key not in values]:
        raise UserError(f"{path} is damaged: it has no {', '.join(absent)}. {remedy}")
    return values


def read_tensors(path: Path, remedy: str = AGAIN) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises UserError if it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is missing or damaged ({error}). {remedy}") from error


def is_whole(path: Path) -> bool:
    """Whether a file is there and was not cut off: its format's end is where it must be. Its values are not read."""
    check = ENDS.get(path.suffix, lambda _: True)
    try:
        return check(path)
    except (OSError, ValueError, KeyError, struct.error):
        return False


def _ends_with(*endings: bytes) -> Callable[[Path], bool]:
    def check(path: Path) -> bool:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16))
            return file.read().rstrip().endswith(endings)

    return check


def _is_json(path: Path) -> bool:
    json.loads(path.read_text())
    return True


def stored_entries(path: Path) -> dict[str, dict[str, Any]]:
    """Tensor -> its dtype and shape as a safetensors file has them; raises ValueError if the file was cut off.

    A file is 8 bytes of length, that many of header, and the data up to the largest end offset. The library would map
    all of it, which a system with less memory than that refuses.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries: dict[str, dict[str, Any]] = json.loads(file.read(length)) if 8 + length <= size else {}
    if not isinstance(entries, dict):
        raise ValueError("the header is no mapping")
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        _check_entry(name, entry)
    end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size != end:
        raise ValueError(f"{size} bytes of {end} are there")
    return entries


def _check_entry(name: str, entry: Any) -> None:
    try:
        (start, end), shape = entry["data_offsets"], entry["shape"]
        sound = isinstance(entry["dtype"], str) and all(type(n) is int and n >= 0 for n in (start, end - start, *shape))
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(f"what the header says of {name} is damaged")


def stored_metadata(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says of the whole; empty where it says nothing, or is none."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= path.stat().st_size else {}
            told = header.get("__metadata__", {}).items()
            return {name: value for name, value in told if isinstance(value, str)}
    except (OSError, ValueError, AttributeError, struct.error):
        return {}


def _holds_all_tensors(path: Path) -> bool:
    stored_entries(path)
    return True


def _is_riff(path: Path) -> bool:
    with path.open("rb") as file:
        mark, length, kind = struct.unpack("<4sI4s", file.read(12))
    return (mark, kind) == (b"RIFF", b"WAVE") and path.stat().st_size == 8 + length


ENDS: dict[str, Callable[[Path], bool]] = {  # by the ending of the file's name
    ".png": _ends_with(b"IEND\xaeB`\x82"),
    ".gif": _ends_with(b";"),
    ".html": _ends_with(b"</html>"),
    ".json": _is_json,
    ".safetensors": _holds_all_tensors,
    ".wav": _is_riff,
}


LOCK = ".lock"


@contextmanager
def lock(folder: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold `folder` for this process; the system lets go of it when the process ends, however it ends.

    `on_wait` is called once if another process holds it: it may raise, or say that this one waits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / LOCK)
    try:
        held.acquire(timeout=0)
    except Timeout:
        on_wait()
        held.acquire(poll_interval=0.2)
    try:
        yield
    finally:
        held.release()


def is_held(folder: Path) -> bool:
    """Whether a process holds `folder` now, as `lock` does; nothing is written."""
    with suppress(OSError), (folder / LOCK).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def unfinished(folder: Path) -> list[Path]:
    """What killed or still running writers have in `folder` and below."""
    return [*folder.rglob("*.tmp")]


def remove_temporary(folder: Path) -> None:
    """Delete what killed writers left in `folder` and below; call it with the lock held."""
    for path in unfinished(folder):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def damaged_files(folder: Path) -> list[Path]:
    """Files directly in `folder` that were cut off."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in files if path.suffix in ENDS and path.is_file() and not is_whole(path)]
