"""viditq.log in a run's folder: what this process has printed since `keep_in`, as plain text."""

import contextlib
from datetime import datetime
from pathlib import Path

NAME = "viditq.log"
COMPOSED = "hydra"  # folder of the composed configuration in a run's, `hydra.output_subdir`
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


def remove_unused(folder: Path) -> None:
    """Empty and remove the folder of a run that was refused or only estimated, where nothing of any use lies in it.

    Hydra makes it, with an empty log and the composed configuration, before any code of ours. Empty folders above it
    go too, up to where we are; one that is elsewhere stays, empty: it may be the user's.
    """
    if not folder.is_dir():
        return
    composed = [folder / COMPOSED / f"{name}.yaml" for name in ("config", "hydra", "overrides")]
    files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    if any(path not in composed and (path != folder / NAME or path.stat().st_size) for path in files):
        return
    with contextlib.suppress(OSError):  # a folder of someone else's among them, or one that is in use
        for path in files:
            path.unlink()
        if (folder / COMPOSED).is_dir():
            (folder / COMPOSED).rmdir()
        here = Path.cwd()
        while folder != here and here in folder.resolve().parents:
            folder.rmdir()
            folder = folder.parent
