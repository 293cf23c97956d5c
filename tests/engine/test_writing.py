"""Samples are written in a thread while the next ones are made: none is lost, none waits for ever, each as before."""

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from viditq.cli import user_message
from viditq.data.samples import save_sample
from viditq.engine.writing import NotWritten, SampleWriter, waiting_samples
from viditq.stages import samples as stage

Run = Callable[..., dict[str, Any] | None]


def clip(value: int) -> Tensor:
    return torch.full((1, 3, 2, 2), value, dtype=torch.uint8)


def test_they_come_in_their_order_and_in_another_thread() -> None:
    seen: list[tuple[int, int, str]] = []
    with SampleWriter(lambda i, c: seen.append((i, int(c.max()), threading.current_thread().name)), 2) as writer:
        for i in (3, 1, 2, 0):
            writer.put(i, clip(10 * i))
    assert seen == [(i, 10 * i, "samples") for i in (3, 1, 2, 0)]


def test_no_more_wait_than_may() -> None:
    """Two in memory and one being written: the fourth has to wait."""
    begun, go = threading.Semaphore(0), threading.Event()

    def sink(index: int, _: Tensor) -> None:
        begun.release()
        assert go.wait(10)

    with SampleWriter(sink, 2) as writer:
        writer.put(0, clip(0))
        assert begun.acquire(timeout=10)
        for i in (1, 2):
            writer.put(i, clip(i))
        fourth = threading.Thread(target=writer.put, args=(3, clip(3)))
        fourth.start()
        fourth.join(0.1)
        assert fourth.is_alive()
        go.set()
        fourth.join(10)
        assert not fourth.is_alive()


def test_an_error_ends_it_at_the_next_step_and_nothing_waits_for_ever() -> None:
    failed, written = threading.Event(), []

    def sink(index: int, _: Tensor) -> None:
        if index == 1:
            failed.set()
            raise OSError(errno.ENOSPC, "No space left on device", "000001.png")
        written.append(index)

    model = nn.Identity()
    with pytest.raises(NotWritten, match="could not be written") as raised, SampleWriter(sink, 1) as writer:
        writer.watch([model])
        model(clip(0))
        for i in (0, 1, 2):
            writer.put(i, clip(i))
        assert failed.wait(10)
        for _ in range(10**6):
            model(clip(0))  # a denoising step
    assert written == [0] and "disk is full" in (user_message(raised.value) or "")
    model(clip(0))  # nobody watches any more


def test_what_was_put_is_written_whatever_ends_the_run() -> None:
    written: list[int] = []
    with pytest.raises(SystemExit), SampleWriter(lambda i, _: written.append(i), 4) as writer:
        for i in range(4):
            writer.put(i, clip(i))
        raise SystemExit(130)
    assert written == [0, 1, 2, 3]


def test_an_error_after_the_last_sample_is_told() -> None:
    def sink(index: int, _: Tensor) -> None:
        raise ValueError("no such format")

    with pytest.raises(NotWritten) as raised, SampleWriter(sink, 1) as writer:
        writer.put(0, clip(0))
    assert str(raised.value.__cause__) == "no such format"


def test_ctrl_c_while_the_last_ones_are_written_loses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    with pytest.raises(SystemExit), SampleWriter(lambda i, _: written.append(i), 4) as writer:
        for i in range(3):
            writer.put(i, clip(i))
        thread, join = writer._thread, writer._thread.join  # type: ignore[union-attr]
        interruptions = iter([SystemExit(130)])

        def interrupted(*_: Any) -> None:
            if (error := next(interruptions, None)) is not None:
                raise error
            join()

        monkeypatch.setattr(thread, "join", interrupted)
    assert written == [0, 1, 2]


def test_without_a_thread_it_is_written_at_once() -> None:
    written: list[int] = []
    with SampleWriter(lambda i, _: written.append(i), 0) as writer:
        writer.put(7, clip(7))
        assert written == [7]


def test_a_batch_waits_on_a_gpu_and_none_on_a_cpu() -> None:
    trainers = [SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(kind))) for kind in ("cuda", "cpu")]
    assert [waiting_samples(trainer, 4) for trainer in trainers] == [4, 0]  # type: ignore[arg-type]


def test_a_run_that_writes_in_a_thread_has_the_same_files_and_goes_on_after_a_full_disk(
    run: Run, finished_run: Path, shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = [True]

    def save(path: Path, sample: Tensor) -> None:
        assert threading.current_thread().name == "samples"
        if fails and path.stem == "000001":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save_sample(path, sample)

    monkeypatch.setattr(stage, "waiting_samples", lambda trainer, batch_size: batch_size)
    monkeypatch.setattr(stage, "save_sample", save)
    with pytest.raises(NotWritten) as raised:
        run(tmp_path / "run", shared_cache)
    assert "000001" in (message := user_message(raised.value) or "") and "disk is full" in message
    kept = tmp_path / "run" / "samples" / "000000.png"
    changed = kept.stat().st_mtime_ns
    fails.clear()
    metrics, before = run(tmp_path / "run", shared_cache), finished_run / "samples"
    assert metrics is not None and kept.stat().st_mtime_ns == changed
    names = sorted(path.name for path in before.glob("*.png"))
    assert len(names) > 1 and names == sorted(path.name for path in kept.parent.glob("*.png"))
    assert all((before / name).read_bytes() == (kept.parent / name).read_bytes() for name in names)
