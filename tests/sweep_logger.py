"""A logger for test_sweep.py: leaves the group it was given beside the run."""

from pathlib import Path


def group_logger(folder: Path, name: str, group: str | None, run_id: str) -> None:
    """Writes <run>/group.txt."""
    (folder / "group.txt").write_text(str(group))
