"""The processes of one run: who they are, how they share work, wait for each other, and end together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed

from viditq.errors import AlreadyReported

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments import ClusterEnvironment

T = TypeVar("T")
LAUNCHED = ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS")  # set in what torchrun and srun start
# A process that dies closes its connections, which ends the others at once; only a silent network waits this long.
# Encoding prompts or calibrating in another run may keep a process waiting for hours.
TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """`rank` of `count` processes that run the same stages; rank 0 does what is done once."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's items: every count-th, so that shares differ by at most one."""
        return list(items[self.rank :: self.count])

    def wait(self) -> None:
        """Return when all processes are here."""
        if self.count > 1:
            distributed.all_reduce(torch.zeros(1))  # on the CPU: through gloo, which notices a dead peer at once

    def first_does(self, work: Callable[[], T]) -> T:
        """`work` on rank 0 while the others wait; all return its result, or fail if it failed."""
        if self.count == 1:
            return work()
        message: list[Any] = [None]
        if self.first:
            try:
                message = [(True, work())]
            except BaseException:
                _broadcast([(False, None)])
                raise
        _broadcast(message)
        done, result = message[0]
        if not done:
            raise AlreadyReported
        return result


def _broadcast(message: list[Any]) -> None:
    distributed.broadcast_object_list(message, device=torch.device("cpu"))


def environment() -> ClusterEnvironment | None:
    """What launched several processes (torchrun, srun, or `launch`), None if nothing did."""
    if not any(name in os.environ for name in LAUNCHED):
        return None
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment  # takes seconds

    for kind in (TorchElasticEnvironment, SLURMEnvironment):
        if kind.detect():
            found = kind()
            return found if found.world_size() > 1 else None
    return None


@contextmanager
def joined() -> Iterator[Processes]:
    """Meet the other processes of this run, if there are any; leave them at the end."""
    found = environment()
    if found is None:
        yield Processes()
        return
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = found.main_address, str(found.main_port)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    rank, count = found.global_rank(), found.world_size()
    distributed.init_process_group(backend, rank=rank, world_size=count, timeout=TIMEOUT)
    try:
        yield Processes(rank, count)
    finally:
        distributed.destroy_process_group()


def lost_peer(error: BaseException) -> bool:
    """Whether `error` only says that another process has gone, which is reported where it happened."""
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Gloo")
    )
