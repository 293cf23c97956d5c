"""Runs that are killed, meet a full or read-only disk, or meet each other; see kill_harness.py."""

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import Forked

from viditq.cli import user_message
from viditq.errors import UserError
from viditq.files import lock

ROOT = Path(__file__).parents[1]
Run = Callable[..., dict[str, Any] | None]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def harness(tmp_path: Path, kills: int, seed: int, *overrides: str) -> str:
    """What kill_harness.py prints; it must succeed."""
    command = [
        sys.executable,
        str(ROOT / "tests" / "kill_harness.py"),
        str(tmp_path),
        str(kills),
        str(seed),
        *overrides,
    ]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Slow: kills at random times in a process of its own; test_run.py kills in chosen places, in the tests' own process.
@pytest.mark.slow
def test_two_kills(tmp_path: Path) -> None:
    assert "2 kills in " in harness(tmp_path, 2, 0)


@pytest.mark.slow
def test_thirty_kills_in_every_stage(tmp_path: Path) -> None:
    out = harness(tmp_path, 30, 1)
    for stage in ("prompts", "reference", "noise_floor", "quantize", "generate", "evaluate", "report"):
        assert f"ms into {stage}" in out, out


# The same folder or cache twice at once -------------------------------------------------------------------------------


def test_folder_that_another_process_works_in(run: Run, run_copy: Path, shared_cache: Path) -> None:
    with lock(run_copy, lambda: None), pytest.raises(UserError, match="Another process is working on"):
        run(run_copy, shared_cache)
    run(run_copy, shared_cache)


def test_same_command_twice_at_once(tmp_path: Path) -> None:
    """One works, the other is told; afterwards the run is complete."""
    where = [f"hydra.run.dir={tmp_path}/run", f"cache_dir={tmp_path}/cache", "data.num_prompts=8", "logger=none"]
    both = [Forked(tmp_path, name, "experiment=smoke", *where) for name in "12"]
    ends = [run.ended() for run in both]
    assert 0 in [code for code, _, _ in ends], ends
    for code, _, error in ends:
        assert code == 0 or (code == 2 and "Another process is working on" in error and "Traceback" not in error)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["prompts"] == 8


def test_run_waits_for_another_at_the_shared_cache(shrunk: list[str], tmp_path: Path, finished_run: Path) -> None:
    """Two experiments at once: the reference and the statistics are made once, the second finds them."""
    runs = {"a": [], "b": ["quant.weight.bits=8"]}
    where = f"cache_dir={tmp_path}/cache"
    forks = [Forked(tmp_path, n, *shrunk, where, *more, f"hydra.run.dir={tmp_path}/{n}") for n, more in runs.items()]
    ends = [fork.ended() for fork in forks]
    assert [code for code, _, _ in ends] == [0, 0], ends
    outs = [out for _, out, _ in ends]
    made = "".join(outs)
    assert made.count("2 of 2 float samples generated") == 1 and made.count("2 prompts observed") <= 2
    found = json.loads((tmp_path / "a" / "metrics.json").read_text())["metrics"]
    assert found == json.loads((finished_run / "metrics.json").read_text())["metrics"]


# Disks ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 600 KiB."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    gc.collect()  # tensors read from a file map it, and Lightning's modules and trainers live until they are collected
    subprocess.run(["umount", str(folder)], check=True)


def test_run_goes_on_when_the_full_disk_has_room_again(
    run: Run, finished_run: Path, small_disk: Path, tmp_path: Path
) -> None:
    """The cache fills the disk in the middle of a run; after it has grown the same command ends as if undisturbed."""
    with pytest.raises(Exception) as error:
        run(tmp_path / "run", small_disk / "cache")
    assert "disk is full" in (user_message(error.value) or "")
    assert not list(small_disk.rglob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    metrics = run(tmp_path / "run", small_disk / "cache") or {}
    expected = json.loads((finished_run / "metrics.json").read_text())
    assert {k: v for k, v in metrics.items() if k != "seconds"} == {k: v for k, v in expected.items() if k != "seconds"}


def test_read_only_output(small_disk: Path, tmp_path: Path) -> None:
    """A file system that is mounted read-only: refused with a remedy by the command line's guard."""
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    code, _, error = Forked(
        tmp_path, "run", "experiment=smoke", f"hydra.run.dir={small_disk}/run", "logger=none"
    ).ended()
    assert code == 2 and "read-only" in error and "hydra.run.dir=FOLDER" in error
    assert "Traceback" not in error
