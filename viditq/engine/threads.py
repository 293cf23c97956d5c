"""How many threads a process computes with: the cores it may use, shared with other runs of viditq that are going on.

Threads of two processes that together are more than the cores slow both by an order of magnitude, since OpenMP's
threads wait for each other by spinning. Each process that computes holds a lock on a file of its own in a folder that
all runs of a user share; the system lets go of it when the process ends, however it ends.
"""

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from viditq.engine.control_groups import cpu_quota

VARIABLE = "OMP_NUM_THREADS"
_SHARE: ContextVar["CoreShare | None"] = ContextVar("share", default=None)  # torch's threads are the process's, too


@dataclass(frozen=True)
class Claim:
    """What a process that computes says of itself: the cores that are its own; threads: fixed by hand, or its share."""

    cores: frozenset[int]
    threads: int | None = None


@dataclass(frozen=True)
class Threads:
    """A number of threads and the reason for it, printed as `threads: 2 (2 cores)`."""

    count: int
    why: str

    def __str__(self) -> str:
        return f"threads: {self.count} ({self.why})"


def share(cores: int, what: str, mine: Claim, others: Sequence[Claim]) -> Threads:
    """The threads of a process beside others.

    cores: what it may use at most, `what` in words. Of those what others have fixed by hand is taken off, if they run
    on cores of this process; the rest is divided equally among it and the others.
    """
    if mine.threads is not None:
        return Threads(mine.threads, VARIABLE)
    beside = [other for other in others if other.cores & mine.cores]
    if not beside:
        return Threads(cores, what)
    fixed = sum(other.threads for other in beside if other.threads is not None)
    sharing = 1 + sum(other.threads is None for other in beside)
    runs = f"{len(beside)} other {'process' if len(beside) == 1 else 'processes'}"
    return Threads(max(1, (cores - fixed) // sharing), f"{what}, shared with {runs} of viditq")


def usable_cores(most: int) -> tuple[int, str]:
    """Cores for this process, and in words why so many; most: what torch would take, the physical ones."""
    quota = cpu_quota()
    if quota is not None and quota < most:
        count = max(1, int(quota))
        return count, f"a quota of {quota:g} of the processor's time"
    return most, f"{most} {'core' if most == 1 else 'cores'}"


def affinity() -> frozenset[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


class Registry:
    """The processes that compute at this moment, each with a locked file in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def entered(self, claim: Claim) -> Iterator[Path]:
        """Be among them; yields the file of this process. Raises OSError where the folder cannot be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            with self._alone():
                number, name = tempfile.mkstemp(".json", f"{os.getpid()}-", self.folder)
                file = held.enter_context(os.fdopen(number, "w"))
                fcntl.flock(file, fcntl.LOCK_EX)
                json.dump({"cores": sorted(claim.cores), "threads": claim.threads}, file)
                file.flush()
            try:
                yield Path(name)
            finally:
                Path(name).unlink(missing_ok=True)

    def others(self, mine: Path | None) -> list[Claim]:
        """All but the file `mine`; what ended processes have left behind is removed."""
        with self._alone():
            return [claim for path in sorted(self.folder.glob("*.json")) if path != mine and (claim := _alive(path))]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """A file is locked before another process looks at it."""
        with (self.folder / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _alive(path: Path) -> Claim | None:
    with suppress(OSError, ValueError, KeyError), path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            values: dict[str, Any] = json.load(file)
            return Claim(frozenset(values["cores"]), values["threads"])
        path.unlink(missing_ok=True)  # its process has ended
    return None


class CoreShare:
    """Keeps torch's threads of this process at its share of the cores."""

    def __init__(self, registry: Registry, mine: Path | None, claim: Claim, most: int) -> None:
        self.registry, self.mine, self.claim, self.most = registry, mine, claim, most
        self.counted: list[set[int]] = []

    def follow(self) -> Threads:
        """Look who computes now, and set the number of threads accordingly."""
        others: list[Claim] = []
        with suppress(OSError):  # the folder for temporary files may be tidied up at any time
            others = self.registry.others(self.mine) if self.mine is not None else []
        threads = share(*usable_cores(self.most), self.claim, others)
        if threads.count != torch.get_num_threads():
            torch.set_num_threads(threads.count)
        for counts in self.counted:
            counts.add(threads.count)
        return threads


@contextmanager
def sharing_cores(folder: Path | None = None) -> Iterator[CoreShare]:
    """Be counted among the processes that compute, while the block lasts; afterwards torch's threads are as before.

    folder: where these processes meet; None = the user's in the system's folder for temporary files. Where that cannot
    be written the process counts as alone.
    """
    most = torch.get_num_threads()
    claim = Claim(affinity(), most if VARIABLE in os.environ else None)
    registry = Registry(folder or Path(tempfile.gettempdir()) / f"viditq-threads-{os.getuid()}")
    with ExitStack() as stack:
        mine: Path | None = None
        with suppress(OSError):
            mine = stack.enter_context(registry.entered(claim))
        mine_now = CoreShare(registry, mine, claim, most)
        token = _SHARE.set(mine_now)
        try:
            yield mine_now
        finally:
            _SHARE.reset(token)
            torch.set_num_threads(most)


def follow_cores() -> None:
    """Between two pieces of long work: as `follow` of the share that this process has, if it has one."""
    current = _SHARE.get()
    if current is not None:
        current.follow()


@contextmanager
def counting_threads() -> Iterator[set[int]]:
    """The numbers of threads that this process computes with while the block lasts; as many as it has had by now."""
    counts, current = {torch.get_num_threads()}, _SHARE.get()
    if current is None:
        yield counts
        return
    current.counted.append(counts)
    try:
        yield counts
    finally:
        current.counted = [others for others in current.counted if others is not counts]
