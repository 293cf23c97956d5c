"""Batches that several processes make side by side: what arrives, when they are used, and how they end."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data._utils import worker
from tqdm import tqdm as bar_with_text
from tqdm.auto import tqdm as bar

from viditq.engine import workers
from viditq.engine.trainer import Trainer
from viditq.engine.workers import SMALL, Made, SideBySide, count_workers, ended_early
from viditq.errors import UserError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")

BATCHES = [[0, 1], [2, 3], [4, 5], [6, 7], [8]]


def make(indices: list[int]) -> list[tuple[Tensor, ...]]:
    """A picture and a sound of each prompt, which tell its index and the process that made it."""
    return [(torch.full((2, 3), i, dtype=torch.uint8), torch.tensor([i, os.getpid()])) for i in indices]


def test_full_rounds_are_made_in_order_and_the_rest_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_rng_state()
    side_by_side = SideBySide(BATCHES, make, 2)
    *made, rest = side_by_side
    assert len(side_by_side) == 5 and rest == [8]
    assert [batch.indices for batch in made if isinstance(batch, Made)] == BATCHES[:4]
    makers = set()
    for batch in made:
        for index, (picture, sound) in zip(batch.indices, batch.samples, strict=True):
            assert picture.dtype == torch.uint8 and bool((picture == index).all()) and int(sound[0]) == index
            makers.add(int(sound[1]))
    assert len(makers) == 2 and os.getpid() not in makers
    assert torch.equal(torch.get_rng_state(), before)


def make_with_bars(indices: list[int]) -> list[tuple[Tensor, ...]]:
    """As pipelines do, whose bars are switched off."""
    return [(torch.tensor(i),) for kind in (bar, bar_with_text) for i in kind(indices, disable=True)]


@pytest.mark.parametrize("of_forks", [False, True])
def test_a_lock_of_bars_that_a_thread_holds_while_forking(of_forks: bool) -> None:
    """As tqdm's own does, every ten seconds: a run stood still until it was killed."""
    (shared, copied), held, done = bar.get_lock().locks, threading.Event(), threading.Event()

    def hold() -> None:
        with shared if of_forks else copied:
            held.set()
            done.wait(60)

    thread, before = threading.Thread(target=hold), signal.getsignal(signal.SIGALRM)
    thread.start()
    try:
        assert held.wait(60)
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the workers stand still"))
        signal.alarm(30)
        made = list(SideBySide([[0], [1]], make_with_bars, 2))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        done.set()
        thread.join()
    assert [batch.indices for batch in made if isinstance(batch, Made)] == [[0], [1]]


def threads_of(indices: list[int]) -> list[tuple[Tensor, ...]]:
    return [(torch.tensor([torch.get_num_threads()]),) for _ in indices]


def test_each_has_one_thread(two_threads: None) -> None:
    batches = list(SideBySide([[0], [1]], threads_of, 2))
    assert [int(batch.samples[0][0]) for batch in batches if isinstance(batch, Made)] == [1, 1]


@pytest.fixture
def two_threads() -> Any:
    """torch with two threads in this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def refuse(indices: list[int]) -> list[tuple[Tensor, ...]]:
    raise UserError(f"Samples of prompts {indices} are not finite.")


def fail(indices: list[int]) -> list[tuple[Tensor, ...]]:
    raise KeyError("gone")


def run_out(indices: list[int]) -> list[tuple[Tensor, ...]]:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")


def die(indices: list[int]) -> list[tuple[Tensor, ...]]:
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def test_errors_come_as_they_are() -> None:
    with pytest.raises(UserError) as caught:
        list(SideBySide(BATCHES, refuse, 2))
    assert str(caught.value) == "Samples of prompts [0, 1] are not finite."
    with pytest.raises(KeyError, match="gone"):
        list(SideBySide(BATCHES, fail, 2))
    with pytest.raises(RuntimeError) as out:
        list(SideBySide(BATCHES, run_out, 2))
    assert str(out.value).startswith("DefaultCPUAllocator: ") and ended_early(out.value) is None
    assert "in run_out" in "".join(out.value.__notes__)


def test_one_that_has_not_begun_is_ended_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ended by the signal itself, which torch would tell as an error at any time after."""
    loop = worker._worker_loop

    def begin(*args: Any) -> None:
        if args[10] == 1:  # its number
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(60)
        loop(*args)

    monkeypatch.setattr(worker, "_worker_loop", begin)
    others = multiprocessing.active_children()
    with pytest.raises(UserError):
        list(SideBySide(BATCHES, refuse, 2))
    end = time.monotonic() + 60
    while any(process not in others for process in multiprocessing.active_children()) and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.1)  # in which its end would be told


def test_of_one_that_was_killed_it_is_said_what_to_do() -> None:
    with pytest.raises(RuntimeError) as caught:
        list(SideBySide(BATCHES, die, 2))
    told = ended_early(caught.value)
    assert isinstance(told, UserError) and "trainer.workers=0" in str(told)


def slowly(indices: list[int]) -> list[tuple[Tensor, ...]]:
    if indices[0] > 3:
        time.sleep(60)
    return make(indices)


def test_closed_early_they_end() -> None:
    """Also in the middle of a batch, for which torch would wait 5 s."""
    side_by_side = SideBySide(BATCHES, slowly, 2)
    going = iter(side_by_side)
    next(going)
    assert len(multiprocessing.active_children()) >= 2
    begin = time.monotonic()
    side_by_side.close()
    del going
    wait_for(lambda: not multiprocessing.active_children())
    assert time.monotonic() - begin < 4
    SideBySide(BATCHES, make, 2).close()  # never begun


def tell_and_sleep(indices: list[int]) -> list[tuple[Tensor, ...]]:
    Path(os.environ["TOLD"], str(os.getpid())).touch()
    time.sleep(60)
    return make(indices)


def test_they_do_not_outlive_a_run_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOLD", str(tmp_path))
    pid = os.fork()
    if not pid:
        list(SideBySide(BATCHES, tell_and_sleep, 2))
        os._exit(0)
    wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    wait_for(lambda: not any(is_running(pid) for pid in pids))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Not a zombie, which waits for whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_they_leave_without_a_word_where_all_are_told_to_stop(number: int, tmp_path: Path) -> None:
    """Ctrl-C in a terminal and a job's end under slurm reach every process; the run says so, once."""
    context: Any = multiprocessing.get_context("fork")
    child = context.Process(target=begin_and_wait, args=(tmp_path / "begun",))
    child.start()
    wait_for((tmp_path / "begun").exists)
    os.kill(child.pid, number)
    child.join(30)
    assert child.exitcode == 0


def begin_and_wait(begun: Path) -> None:
    workers._begin(0)
    begun.touch()
    time.sleep(60)


@pytest.mark.parametrize(
    ("change", "count"),
    [
        ({}, 4),
        ({"workers": 3}, 3),
        ({"workers": 9}, 4),
        ({"workers": 1}, 0),
        ({"workers": 0}, 0),
        ({"threads": 1}, 0),
        ({"world_size": 2}, 0),
        ({"device": "cuda"}, 0),
        ({"weights": SMALL + 1}, 0),
        ({"batches": 3}, 0),
        ({"free": 4 * 2**30 - 1}, 0),
        ({"free": None}, 0),
    ],
)
def test_when_there_are_any(change: dict[str, Any], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    at = {"workers": None, "threads": 4, "world_size": 1, "device": "cpu", "weights": SMALL, "batches": 4} | {
        "free": 4 * 2**30
    }
    at |= change
    monkeypatch.setattr(workers, "free_bytes", lambda _: at["free"])
    monkeypatch.setattr(torch, "get_num_threads", lambda: at["threads"])
    strategy = SimpleNamespace(root_device=torch.device(at["device"]))
    trainer: Any = SimpleNamespace(workers=at["workers"], strategy=strategy, world_size=at["world_size"])
    assert count_workers(trainer, at["weights"], at["batches"]) == count


def test_without_shared_locks_there_are_none(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    monkeypatch.setattr(workers, "free_bytes", lambda _: 2**40)
    assert count_workers(trainer, 1, 4) == 2
    monkeypatch.setattr(type(multiprocessing.get_context("fork")), "Lock", refused)
    assert count_workers(trainer, 1, 4) == 0


def test_a_trainer_of_lightning_has_none(two_threads: None) -> None:
    assert count_workers(L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False), 1, 4) == 0


@pytest.mark.parametrize("given", [-1, 1.5, "auto", True])
def test_their_number_is_checked(given: Any) -> None:
    with pytest.raises(UserError, match=r"trainer\.workers=.* is no number of processes"):
        Trainer(accelerator="cpu", workers=given)
