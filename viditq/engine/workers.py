"""Batches of a small model side by side on a CPU: as many processes as there are threads, each with one.

All threads together do not make a step of milliseconds so many times faster: Python and small operators run on one of
them, and the others wait at the end of each operator. A fifth to a third of the time of tiny_video's samples on two
cores is that. Workers are those of torch's DataLoader, forked from this process, whose loaded model they read; a batch
is the same to the bit wherever it is made.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling
from tqdm.std import tqdm

from viditq.engine.timing import free_bytes
from viditq.errors import UserError
from viditq.parent import end_with_parent

SMALL = 100_000_000  # bytes of a denoiser's weights: steps of larger ones are long enough for all threads
ROOM = 2**30  # bytes of memory that have to be free for each (0.2 GB for tiny_video's batches of 8)
DIED = "DataLoader worker (pid"  # in what torch says of one that ended

Sample = tuple[Tensor, ...]
Make = Callable[[list[int]], list[Sample]]


class Made:
    """A batch that is sampled: the prompts' indices, and of each the sample as a tuple."""

    def __init__(self, indices: list[int], samples: list[Sample]) -> None:
        self.indices, self.samples = indices, samples


class SideBySide:
    """The batches in their order, to be gone through once: `Made` by workers, as far as there is one for each worker;
    the rest as they were given, for all threads at once. `close` ends the workers.
    """

    def __init__(self, batches: Sequence[list[int]], make: Make, workers: int) -> None:
        self.batches, self.make, self.workers = batches, make, workers
        self._going: Any = None

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int] | Made]:
        self._going = self._made()
        yield from self._going

    def _made(self) -> Iterator[list[int] | Made]:
        whole = len(self.batches) - len(self.batches) % self.workers
        loader = DataLoader(
            _ToMake(self.batches[:whole], self.make),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.workers,
            multiprocessing_context="fork",
            worker_init_fn=_begin,
            generator=torch.Generator(),  # seeds workers by a number of its own, not by one of torch's generator
        )
        others = multiprocessing.active_children()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)  # Python 3.12 and later
            arriving = iter(loader)
        try:
            for indices, samples in arriving:
                if isinstance(samples, Exception):
                    raise samples
                yield Made(indices, [tuple(map(torch.from_numpy, sample)) for sample in samples])
        finally:
            _end(arriving, [process for process in multiprocessing.active_children() if process not in others])
        yield from self.batches[whole:]

    def close(self) -> None:
        """End the workers, wherever they are."""
        if self._going is not None:
            self._going.close()


class _ToMake(Dataset[Any]):
    """What workers do.

    Samples go back as arrays: of tensors torch would share the memory, of which containers have little. Errors whose
    message is read (UserError, those of memory) as what they are: of others torch makes one long text.
    """

    def __init__(self, batches: Sequence[list[int]], make: Make) -> None:
        self.batches, self.make = batches, make

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Any:
        indices = self.batches[number]
        try:
            return indices, [tuple(tensor.numpy() for tensor in sample) for sample in self.make(indices)]
        except (UserError, RuntimeError) as error:
            if not isinstance(error, UserError):
                error.add_note(f"In a process that makes samples beside others:\n{traceback.format_exc()}")
            return indices, error


def _end(arriving: Any, workers: Sequence[Any]) -> None:
    """The workers of torch's iterator, wherever they are; torch's own way, once all has arrived, has left none.

    In the middle that one waits for each worker's batch, and for good where a worker ends with the lock of an event
    that it shares. It would tell of a worker that is ended before it knows any signal, too: as an error, in whatever
    the run does by then.
    """
    if getattr(arriving, "_worker_pids_set", False):
        signal_handling._remove_worker_pids(id(arriving))
        arriving._worker_pids_set = False
    arriving._shutdown = True
    for process in workers:  # they hold nothing that has to be put in order
        process.kill()
    for process in workers:
        process.join()
    for queue in getattr(arriving, "_index_queues", ()):
        queue.cancel_join_thread()
        queue.close()


def _as_it_is(batch: Any) -> Any:
    return batch


def _begin(_: int) -> None:
    """In a worker: what ends a run is heard, told and obeyed by the process that started it."""
    end_with_parent()
    _own_lock_of_bars()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))


def _own_lock_of_bars() -> None:
    """For bars that are switched off too, tqdm takes a lock that forked processes share, and one that they copy.

    The copy stays locked where the thread that looks after bars held it at the fork, and a worker that is ended keeps
    the shared one: either lets whoever makes the next bar wait forever.
    """
    lock, kinds = threading.RLock(), [tqdm]
    for kind in kinds:
        kind.set_lock(lock)
        kinds += kind.__subclasses__()


def count_workers(trainer: L.Trainer, weights_bytes: int, num_batches: int) -> int:
    """How many workers make the batches of a model; 0: none, its batches come one after the other on all threads.

    As many as threads, or as trainer.workers allows, where the weights are small, each gets a batch and memory is free
    for all. None beside a GPU or other processes of the run, nor where processes cannot be forked in good order.
    """
    most, device = getattr(trainer, "workers", 0), trainer.strategy.root_device
    threads = torch.get_num_threads()
    count = threads if most is None else min(most, threads)
    if device.type != "cpu" or torch.cuda.is_initialized() or trainer.world_size > 1 or not _can_fork():
        return 0
    free = free_bytes(device)
    if count < 2 or num_batches < count or weights_bytes > SMALL or free is None or free < count * ROOM:
        return 0
    return count


def _can_fork() -> bool:
    """Whether processes can be forked that answer: some places (serverless ones) have no room for shared locks."""
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return False
    try:
        multiprocessing.get_context("fork").Lock()
    except (ImportError, OSError):
        return False
    return True


def ended_early(error: RuntimeError) -> UserError | None:
    """What to say where an error is torch's of a worker that was killed; None for any other."""
    if DIED not in str(error):
        return None
    return UserError(
        "A process that makes samples beside others was ended from outside (the system's memory may be full). Finished "
        "work is kept: run the same command again, with trainer.workers=0 to sample in one process."
    )
