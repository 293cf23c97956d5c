"""viditq.log in a run's folder: what this process has printed since `keep_in`, as plain text."""

import contextlib
from datetime import datetime
from pathlib import Path

NAME = "viditq.log"
_folders: list[Path] = []


def keep_in(folder: Path | None, command: str = "") -> None:
    """From now on what is printed is added to the log of this folder, under the command and its time; None: nowhere."""
    _folders.clear()
    if folder is not None:
        _folders.append(folder)
        add(f"== {datetime.now():%Y-%m-%d %H:%M:%S}  {command}".rstrip())


def add(text: str) -> None:
    """Add a line, or several."""
    for folder in _folders:
        # It was printed too: a full disk ends the run where its work is written, not here.
        with contextlib.suppress(OSError), (folder / NAME).open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")
