"""Threads from given cores, quotas and neighbours, and a registry that forgets the dead."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from viditq.engine import threads
from viditq.engine.threads import (
    Claim,
    Registry,
    counting_threads,
    follow_cores,
    share,
    sharing_cores,
)

ALL = frozenset(range(8))


@pytest.mark.parametrize(
    ("mine", "others", "count"),
    [
        (Claim(ALL), [], 8),
        (Claim(ALL), [Claim(ALL)], 4),
        (Claim(ALL), [Claim(ALL), Claim(ALL)], 2),
        (Claim(ALL), [Claim(ALL)] * 20, 1),
        (Claim(ALL), [Claim(ALL, threads=1)], 7),
        (Claim(ALL), [Claim(ALL, threads=2), Claim(ALL)], 3),
        (Claim(ALL), [Claim(ALL, threads=64)], 1),
        (Claim(ALL), [Claim(frozenset({8, 9}))], 8),  # on other cores
        (Claim(ALL), [Claim(frozenset({7, 8}))], 4),
        (Claim(ALL, threads=5), [Claim(ALL), Claim(ALL)], 5),  # OMP_NUM_THREADS
    ],
)
def test_cores_are_divided_among_the_runs(mine: Claim, others: list[Claim], count: int) -> None:
    assert share(8, "8 cores", mine, others).count == count


def test_the_reason_is_told() -> None:
    assert str(share(8, "8 cores", Claim(ALL), [])) == "threads: 8 (8 cores)"
    assert str(share(8, "8 cores", Claim(ALL), [Claim(ALL)])) == (
        "threads: 4 (8 cores, shared with 1 other process of viditq)"
    )
    assert str(share(8, "8 cores", Claim(ALL, threads=3), [Claim(ALL)])) == "threads: 3 (OMP_NUM_THREADS)"


@pytest.mark.parametrize(("quota", "count"), [(None, 4), (2.9, 2), (0.5, 1), (64.0, 4)])
def test_a_quota_is_cores_too(quota: float | None, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cpu_quota", lambda: quota)
    assert threads.usable_cores(4)[0] == count


def test_the_registry_knows_the_living(tmp_path: Path) -> None:
    """Also what a killed process leaves: a file without a lock, whole or not."""
    registry = Registry(tmp_path / "runs")
    with registry.entered(Claim(ALL)) as mine, registry.entered(Claim(frozenset({1}), threads=2)):
        (registry.folder / "1-dead.json").write_text('{"cores": [0], "threads": null}')
        (registry.folder / "2-dead.json").write_text("")
        assert registry.others(mine) == [Claim(frozenset({1}), threads=2)]
        assert len(list(registry.folder.glob("*.json"))) == 2
    assert not list(registry.folder.glob("*.json"))


def test_another_process_is_seen_and_forgotten_when_it_dies(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from viditq.engine.threads import Claim, Registry\n"
        "with Registry(Path(sys.argv[1])).entered(Claim(frozenset({0}))): print('in', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stdout.readline() == "in\n"
        assert Registry(tmp_path).others(None) == [Claim(frozenset({0}))]
        process.kill()
        process.wait()
        assert Registry(tmp_path).others(None) == []


def test_threads_follow_who_comes_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv(threads.VARIABLE, raising=False)
    monkeypatch.setattr(threads, "usable_cores", lambda most: (4, "4 cores"))
    monkeypatch.setattr(threads, "affinity", lambda: ALL)
    with sharing_cores(tmp_path) as cores:
        assert cores.follow().count == torch.get_num_threads() == 4
        with counting_threads() as counts, Registry(tmp_path).entered(Claim(ALL)):
            follow_cores()
            assert torch.get_num_threads() == 2
        assert counts == {4, 2}
        shutil.rmtree(tmp_path)  # as whatever tidies the folder for temporary files may do
        follow_cores()
        assert torch.get_num_threads() == 4
        assert counts == {4, 2}, "of that time alone"
    assert torch.get_num_threads() == before
    follow_cores()  # of no run: nothing to follow
    assert torch.get_num_threads() == before


def test_omp_num_threads_is_honoured_and_told_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(threads.VARIABLE, "1")
    most = torch.get_num_threads()
    with sharing_cores(tmp_path) as cores, Registry(tmp_path).entered(Claim(threads.affinity())):
        assert str(cores.follow()) == f"threads: {most} (OMP_NUM_THREADS)" and torch.get_num_threads() == most
        assert most in [claim.threads for claim in Registry(tmp_path).others(None)]


def test_a_folder_that_cannot_be_written_counts_as_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delenv(threads.VARIABLE, raising=False)
    monkeypatch.setattr(threads, "usable_cores", lambda most: (most, "cores"))
    with sharing_cores(tmp_path / "file") as cores:
        assert cores.follow().count == torch.get_num_threads()
