"""Kill runs at random moments of every stage and repeat them: `kill_harness.py FOLDER KILLS SEED [OVERRIDE...]`.

One run is killed in several of its stages one after the other (SIGKILL, a random part into the stage), then finished;
runs follow until there were enough kills. A finished run must have the undisturbed one's metrics.json but for seconds,
and neither folder nor cache may hold a temporary file. Imports happen once; every try is forked from here.
"""

import json
import os
import random
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import viditq.models.adapter
import viditq.runner  # noqa: F401
from viditq.config import STAGES

TESTS = runpy.run_path(str(Path(__file__).with_name("conftest.py")))


def start(folder: Path, cache: Path, overrides: list[str]) -> tuple[int, Any]:
    """Fork a run; returns its process id and the lines that it prints."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return pid, os.fdopen(reading, errors="replace")
    os.dup2(writing, 1)
    with open(folder.with_suffix(".log"), "a") as log:
        os.dup2(log.fileno(), 2)
    status = 1
    torch.set_num_threads(1)  # of two threads that do so first in a forked process, one fails now and then
    try:
        TESTS["run_shrunk"](folder, cache, *overrides)
        status = 0
    finally:
        sys.stdout.flush()
        os._exit(status)


def finish(folder: Path, cache: Path, overrides: list[str]) -> dict[str, float]:
    """Run to the end; returns the seconds that each stage took."""
    pid, lines = start(folder, cache, overrides)
    before, seconds = time.perf_counter(), {}
    for line in lines:
        stage = stage_of(line)
        now = time.perf_counter()
        if stage:
            seconds[stage] = now - before
        before = now
    assert os.waitpid(pid, 0)[1] == 0, f"the run failed: {folder.with_suffix('.log').read_text()}"
    return seconds


def stage_of(line: str) -> str | None:
    """The stage that this line says is over; "" for the line before the first one."""
    if " -> " in line and not line.startswith(("[", " ")):
        return ""
    return line.split("] ", 1)[1].split(":", 1)[0] if line.startswith("[") and "] " in line else None


def kill_in(stage: str, after: float, folder: Path, cache: Path, overrides: list[str]) -> bool:
    """Start the run and kill it `after` seconds into `stage`; returns whether it was still running."""
    pid, lines = start(folder, cache, overrides)
    wanted = ["", *STAGES][STAGES.index(stage)]
    for line in lines:
        if stage_of(line) == wanted:
            break
    time.sleep(after)
    done, status = os.waitpid(pid, os.WNOHANG)
    if not done:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not status, f"the run failed: {folder.with_suffix('.log').read_text()}"
    return not done


def numbers(folder: Path) -> dict[str, Any]:
    metrics = json.loads((folder / "metrics.json").read_text())
    return {key: value for key, value in metrics.items() if key != "seconds"}


def leftovers(*folders: Path) -> list[Path]:
    return [path for folder in folders for pattern in ("*.tmp", "partial-*") for path in folder.rglob(pattern)]


def main(folder: Path, kills: int, seed: int, overrides: list[str]) -> None:
    chance, count, killed_in = random.Random(seed), 0, set()
    seconds = finish(folder / "undisturbed", folder / "cache", overrides)
    expected = numbers(folder / "undisturbed")
    for number in range(kills):
        run, cache = folder / f"run{number}", folder / f"cache{number}"
        for stage in sorted(chance.sample(STAGES, min(5, len(STAGES), kills - count)), key=STAGES.index):
            after = chance.uniform(0, seconds[stage])
            if kill_in(stage, after, run, cache, overrides):
                count += 1
                killed_in.add(stage)
                print(f"kill {count}: run {number}, {after * 1000:.0f} ms into {stage}", flush=True)
        finish(run, cache, overrides)
        assert numbers(run) == expected, f"{run}: {numbers(run)} instead of {expected}"
        assert not leftovers(run, cache), leftovers(run, cache)
        if count >= kills:
            break
    print(f"{count} kills in {', '.join(s for s in STAGES if s in killed_in)}; every run ended as the undisturbed one")
    assert count >= kills, "too many runs were over before they could be killed"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
