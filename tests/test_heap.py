"""What the heap of a process of ours keeps, and gives back."""

import platform
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Forked
from omegaconf import DictConfig

from viditq import memory, runner
from viditq.cli import guarded_run

ROUNDS, BLOCKS, BYTES = 10, 8, 5 * 2**20  # together less than is kept at the heap's end
ONCE = BLOCKS * BYTES // 4096  # pages
CODE = f"""
import os, resource
import torch
from viditq.memory import give_back, keep_heap, reusing

def fresh_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range({ROUNDS}):
        blocks = [torch.ones({BYTES}, dtype=torch.uint8) for _ in range({BLOCKS})]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

torch.ones(1)
print(int(keep_heap()))
before = resident()
print(fresh_pages())
with reusing():
    print(fresh_pages())
give_back()
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_a_step_frees_is_there_for_the_next_and_goes_back_when_asked(tmp_path: Path) -> None:
    status, out, err = Forked(tmp_path, "heap", code=CODE).ended()
    assert status == 0, err
    own, apart, reused, more = map(int, out.split())
    assert own and apart > (ROUNDS - 2) * ONCE and reused < 2 * ONCE  # those of the first round
    assert more < BLOCKS * BYTES // 2


def test_a_run_keeps_its_heap(
    configure: Callable[..., DictConfig], shrunk: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[bool] = []
    monkeypatch.setattr(memory, "_own_heap", False)
    monkeypatch.setattr(memory, "_set", lambda parameter, value: True)
    monkeypatch.setattr(runner, "run", lambda cfg, folder, **_: kept.append(memory._own_heap))
    for name in (*memory.CHOSEN, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    guarded_run(configure(*shrunk), tmp_path / "run")
    assert kept == [True]


@pytest.mark.parametrize("chosen", ["MALLOC_TRIM_THRESHOLD_=1000000", "GLIBC_TUNABLES=glibc.malloc.mmap_threshold=9"])
def test_sizes_of_the_environment_are_left_alone(monkeypatch: pytest.MonkeyPatch, chosen: str) -> None:
    asked: list[int] = []
    monkeypatch.setattr(memory, "_own_heap", False)
    for name in ("GLIBC_TUNABLES", *memory.CHOSEN):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(memory, "_set", lambda parameter, value: bool(asked.append(parameter)) or True)
    assert memory.keep_heap() and len(asked) == 2
    monkeypatch.setenv(*chosen.split("=", 1))
    assert not memory.keep_heap()
    with memory.reusing():
        assert len(asked) == 2
