"""Samples on their way from the device to their files, while the next ones are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from queue import Queue
from threading import Thread
from types import TracebackType
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from viditq.hooks import add_hook

Sink = Callable[..., None]


class NotWritten(Exception):
    """A sample could not be written; its cause says why."""


class SampleWriter:
    """Copies samples off a GPU on a stream of its own, into pinned memory, and hands them to `sink(index, *sample)` in
    a thread, in the order that they came. A context: at its end, be it an error or Ctrl-C, all that were put are
    written.

    waiting: how many samples wait in memory at most, after which `put` does; 0 = no thread, `put` writes.
    """

    def __init__(self, sink: Sink, waiting: int) -> None:
        self._sink = sink
        self._error: BaseException | None = None
        self._queue: Queue[tuple[int, list[Tensor], Any] | None] = Queue(waiting)
        self._thread = Thread(target=self._write, name="samples", daemon=True) if waiting else None
        self._hooks: list[RemovableHandle] = []
        self._stream: Any = None

    def __enter__(self) -> SampleWriter:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._thread is not None:
            try:
                self._drain(self._thread)
            except BaseException:  # Ctrl-C while they are written; again, it ends the process
                self._drain(self._thread)
                raise
        if kind is None:
            self.check()

    def _drain(self, thread: Thread) -> None:
        self._queue.put(None)
        thread.join()

    def put(self, index: int, *sample: Tensor) -> None:
        """One sample, of one tensor or more, which nobody changes any more. Raises what went wrong with one before."""
        if self._thread is None:
            return self._sink(index, *(tensor.cpu() for tensor in sample))
        self.check()
        self._queue.put((index, *self._leaving(sample)))

    def check(self, *_: Any) -> None:
        """Raises NotWritten where a sample could not be written."""
        if self._error is not None:
            raise NotWritten("A sample could not be written") from self._error

    def watch(self, modules: Iterable[nn.Module]) -> None:
        """`check` before each of their calls, so that a full disk ends a run in the middle of a long clip."""
        if self._thread is not None:
            self._hooks += [add_hook(module.register_forward_pre_hook, self.check) for module in modules]

    def _leaving(self, sample: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """The sample in main memory, once the event is over; None = it is there."""
        device = sample[0].device
        if device.type != "cuda":
            return [*sample], None
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        hosts = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in sample]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for host, tensor in zip(hosts, sample, strict=True):
                host.copy_(tensor, non_blocking=True)
            arrived = self._stream.record_event()
        for tensor in sample:
            tensor.record_stream(self._stream)  # its memory is not given to another before it has been read
        return hosts, arrived

    def _write(self) -> None:
        while (given := self._queue.get()) is not None:
            index, sample, arrived = given
            if self._error is not None:
                continue  # let go of, so that `put` does not wait for ever
            try:
                if arrived is not None:
                    arrived.synchronize()
                self._sink(index, *sample)
            except BaseException as error:
                self._error = error


def waiting_samples(trainer: L.Trainer, batch_size: int) -> int:
    """How many samples wait for a `SampleWriter`: a batch where a GPU makes them, none on a CPU.

    There encoding takes from the cores that sample, and next to none of the time (1 ms of 1.8 s for tiny_video).
    """
    return batch_size if trainer.strategy.root_device.type == "cuda" else 0
