"""How long functions take beside each other, and how much memory one of them needs while it runs."""

import random
import re
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from viditq.engine.control_groups import memory_left
from viditq.memory import give_back

MIN_ROUNDS = 5  # fewer say nothing about a median
MEMORY = Path("/proc/meminfo")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): the peak of the resident set starts again from what is resident now


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    chance: random.Random,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Name -> seconds of each round; in every round all candidates run once, in another order.

    Whatever slows the machine for a while then slows all of them. A candidate returns when its work is done.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name in chance.sample(list(candidates), len(candidates)):
            start = clock()
            candidates[name]()
            seconds[name].append(clock() - start)
    return seconds


def spread(seconds: list[float]) -> dict[str, float]:
    """The median, and the quantiles at 10 % and 90 %."""
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"median": statistics.median(seconds), "low": tenths[0], "high": tenths[-1]}


def rounds_within(seconds: float | None, each: float, most: int) -> int:
    """How many rounds of `each` seconds fit; at least MIN_ROUNDS and at most `most`, which it is for None."""
    if seconds is None or seconds >= most * each:
        return most
    return max(MIN_ROUNDS, int(seconds / each))


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that `work` takes beside what is there before it; None where the system does not tell.

    On a GPU what its allocator hands out, on a CPU by how much the resident set of the process grows (Linux).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    give_back()  # what earlier work has freed would hide what this needs
    try:
        CLEAR.write_text(RESET_PEAK)
        before = _bytes_of(STATUS, "VmRSS")
        work()
        return max(0, _bytes_of(STATUS, "VmHWM") - before)
    except OSError:  # no such files, or not for this process
        return None


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device (control groups heeded); None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = [memory_left()]
    with suppress(OSError):
        found.append(_bytes_of(MEMORY, "MemAvailable"))
    return min((size for size in found if size is not None), default=None)


def _bytes_of(file: Path, field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB", file.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{file} has no {field}")
    return 1024 * int(found[1])
