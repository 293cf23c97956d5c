"""Hydra makes the run's folder and an empty log before any code of ours: after an estimate they go again."""

from pathlib import Path


def remove_traces(folder: Path) -> None:
    """Remove a run's folder, and those above it, as far as nothing but an empty log is in them."""
    if not folder.is_dir() or any(path.suffix != ".log" or path.stat().st_size for path in folder.iterdir()):
        return
    for log in folder.iterdir():
        log.unlink()
    here = Path.cwd()
    while folder != here and here in folder.resolve().parents and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent
