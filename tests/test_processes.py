"""Several processes make one run: the same samples, statistics and metrics, and an end when one of them dies."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from forked import Forked
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
Run = Callable[..., dict[str, Any] | None]
# Shares of unequal size: 5 prompts and 3 calibration prompts, one a batch; 4 processes leave one without calibration.
UNEVEN = [
    "data.num_prompts=5",
    "data.num_calibration_prompts=3",
    "noise_floor.num_prompts=3",
    "diagnosis.num_prompts=3",
]


def command(shrunk: list[str], folder: Path, *overrides: str) -> list[str]:
    where = [f"hydra.run.dir={folder}/run", f"cache_dir={folder}/cache"]
    return ["run.py", *shrunk, *UNEVEN, *where, *overrides]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def alone(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    run(folder / "run", folder / "cache", *UNEVEN)
    return folder


def assert_same(found: Any, expected: Any, where: str) -> None:
    """Equal, numbers to 1e-5 relative."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_same(found[i], value, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-9), where
    elif not where.endswith((".reason", ".warning")):
        assert found == expected, where


def assert_same_run(folder: Path, alone: Path) -> None:
    """Samples to the bit, statistics and numbers to 1e-5."""
    drawn = ("run", "quantized")  # what is drawn, and its copy beside the model's card
    names = sorted(path.relative_to(alone) for path in alone.rglob("*.png") if path.parent.name not in drawn)
    assert len(names) == 5 + 5 + 2 * 3
    for name in names:
        assert (folder / name).read_bytes() == (alone / name).read_bytes(), name
    for stats in alone.rglob("stats.safetensors"):
        found, expected = load_file(folder / stats.relative_to(alone)), load_file(stats)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-8, msg=key)
    for name in ("metrics.json", "errors.json", "incoherence.json"):
        found, expected = (json.loads((f / "run" / name).read_text()) for f in (folder, alone))
        for numbers in (found, expected):
            numbers.pop("seconds", None)
        assert_same(found, expected, name)
    assert not [path for pattern in ("*.tmp", "partial-*") for path in folder.rglob(pattern)]


def test_two_processes_of_our_own(run: Run, alone: Path, tmp_path: Path) -> None:
    handlers = [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)]
    run(tmp_path / "run", tmp_path / "cache", *UNEVEN, "trainer=ddp_cpu", "trainer.devices=2")
    assert_same_run(tmp_path, alone)
    assert [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)] == handlers, "a later run has its own"


# Slow: processes that torchrun has started, which find each other by its variables, and more of them than prompts.
@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_torchrun(count: int, shrunk: list[str], alone: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}"]
    arguments = command(shrunk, tmp_path, "trainer=ddp_cpu")
    done = subprocess.run([*torchrun, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"in {count} processes") == 1, "only the first process prints"
    assert_same_run(tmp_path, alone)


def workers(parent: int) -> list[psutil.Process]:
    """The processes that a run has started, as long as they run."""
    try:
        children = psutil.Process(parent).children()
        return [child for child in children if "viditq.worker" in " ".join(child.cmdline())]
    except psutil.Error:
        return []


@pytest.fixture
def running(shrunk: list[str], tmp_path: Path) -> Iterator[Forked]:
    """A run that has just started its two processes."""
    fork = Forked(tmp_path, "run", *command(shrunk, tmp_path, "trainer=ddp_cpu", "data.num_prompts=12")[1:])
    while len(workers(fork.pid)) < 2:
        assert fork.process.is_alive(), fork.report()
        time.sleep(0.02)
    yield fork
    fork.process.kill()


def test_a_process_that_dies_ends_the_run_with_a_message(running: Forked, run: Run, tmp_path: Path) -> None:
    victim = workers(running.pid)[1]
    while not list(tmp_path.rglob("*.png")):
        assert running.process.is_alive(), running.report()
        time.sleep(0.02)
    victim.kill()
    code, _, err = running.ended(timeout=120)
    assert code == 2
    assert "was ended by SIGKILL" in err and "run the same command again" in err and "Traceback" not in err
    assert not psutil.pid_exists(victim.pid) and not workers(running.pid)
    made = len(list(tmp_path.rglob("*.png")))
    assert 0 < made < 12
    metrics = run(tmp_path / "run", tmp_path / "cache", *UNEVEN, "data.num_prompts=12") or {}
    assert metrics["prompts"] == 12


def test_workers_end_with_the_command_that_started_them(running: Forked) -> None:
    """Killed, it cannot stop them itself."""
    started = workers(running.pid)
    assert len(started) == 2
    os.kill(running.pid, signal.SIGKILL)
    gone, alive = psutil.wait_procs(started, timeout=60)
    assert len(gone) == 2 and not alive


@pytest.mark.skipif(sys.platform != "linux", reason="the system ends processes whose parent is gone only on Linux")
def test_a_worker_whose_launcher_is_gone_before_it_can_ask_ends_too(tmp_path: Path) -> None:
    arguments = [tmp_path / "config.yaml", tmp_path, "1000000000"]  # no such process
    done = subprocess.run(
        [sys.executable, "-m", "viditq.worker", *map(str, arguments)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1 and "the launcher of this process is gone" in done.stderr


def test_bad_input_is_refused_before_processes_start(shrunk: list[str], tmp_path: Path) -> None:
    code, _, err = Forked(tmp_path, "run", *command(shrunk, tmp_path, "trainer=ddp_cpu", "seed=-1")[1:]).ended()
    assert code == 2 and err.count("error: seed=-1") == 1 and "Traceback" not in err


# Slow: that what fails in the first process alone is said once; how the others end is in the tests beside it.
@pytest.mark.slow
def test_an_error_in_a_process_is_said_once(shrunk: list[str], tmp_path: Path) -> None:
    """A prompt that is too long is seen while prompts are encoded, by the first process."""
    (tmp_path / "long.txt").write_text("a red circle\n" + "red " * 40 + "\n")
    overrides = ["trainer=ddp_cpu", "data=prompt_file", f"data.path={tmp_path}/long.txt", "metric=[psnr]"]
    arguments = [word for word in command(shrunk, tmp_path, *overrides)[1:] if "noise_floor" not in word]
    code, _, err = Forked(tmp_path, "run", *arguments).ended()
    assert code == 2 and err.count("error: ") == 1, err
    assert "Shorten it" in err and "Traceback" not in err
