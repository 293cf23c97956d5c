"""Which of several ways to compute a product is taken: of those that are right the fastest on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from viditq.quant.execution.backends.cuda.product import Product, disagreement

WARM_UP, REPEATS = 2, 5
Clock = Callable[[Callable[[], object], torch.device], float]


@dataclass(frozen=True)
class Candidate:
    """why_not: what keeps it from a product (a package, a shape, a zero point), in a few words; None = nothing."""

    name: str
    run: Callable[[Product], Tensor]
    why_not: Callable[[Product], str | None] = lambda product: None


@dataclass(frozen=True)
class Choice:
    """What was taken; seconds of all that are right, refused: why the others were not; both by name."""

    taken: Candidate
    seconds: Mapping[str, float]
    refused: Mapping[str, str]

    def __str__(self) -> str:
        times = sorted(self.seconds.items(), key=lambda one: one[1])
        told = [f"{name} {1e3 * seconds:.3f} ms" for name, seconds in times]
        left_out = [f"not {name}: {reason}" for name, reason in self.refused.items()]
        return f"{self.taken.name} ({'; '.join([', '.join(told) or 'not timed', *left_out])})"


def choose(product: Product, candidates: Sequence[Candidate], last: Candidate, clock: Clock) -> Choice:
    """Every candidate that can take `product` is tried on a small one of extreme codes and on this one; what fails, or
    lies further from the exact result than rounding explains, is refused; of the rest the one of the fewest seconds.

    last: taken, unasked, where none is left. clock: (call, device) -> seconds of a call.
    """
    seconds: dict[str, float] = {}
    refused: dict[str, str] = {}
    right: dict[str, Candidate] = {}
    extreme, corner = product.extreme(), product.corner()
    for candidate in candidates:
        reason = candidate.why_not(product)
        if reason is None:
            try:
                reason = _wrong(candidate, extreme, extreme) or _wrong(candidate, product, corner)
                if reason is None:
                    right[candidate.name] = candidate
                    seconds[candidate.name] = clock(partial(candidate.run, product), product.x.codes.device)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # of another library: whatever it is, it is not taken
                seconds.pop(candidate.name, None)
                reason = f"it fails ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        if reason is not None:
            refused[candidate.name] = reason
    taken = right[min(seconds, key=lambda name: seconds[name])] if seconds else last
    return Choice(taken, seconds, refused)


def _wrong(candidate: Candidate, product: Product, compared: Product) -> str | None:
    """compared: the corner of `product` that is looked at."""
    if candidate.why_not(product) is not None:  # the small one may be too small
        return None
    rows, _, outs = compared.shape
    out = candidate.run(product)[:rows, :outs]
    far = disagreement(out, compared)
    return None if far <= 1 else f"it disagrees with fake ({far:.2g} times what rounding explains)"


def timed(call: Callable[[], object], device: torch.device) -> float:
    """The least of a few repeats, by the device's own clock on a GPU."""
    for _ in range(WARM_UP):
        call()
    if device.type != "cuda":
        return min(_elapsed(call) for _ in range(REPEATS))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return min(start.elapsed_time(end) for start, end in events) / 1e3


def _elapsed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
