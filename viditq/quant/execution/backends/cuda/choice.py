"""Which of several ways to compute a product is taken: of those that are right the fastest on this machine."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

logger = logging.getLogger("viditq")
WARM_UP, REPEATS = 2, 5
AHEAD = 2_000_000
"""Cycles, a millisecond or so, that a GPU waits while what is timed is put in its queue: Python takes longer to launch
small products than they do, and then the host would be timed."""
Clock = Callable[[Callable[[], object], torch.device], float]


class Product(Protocol):
    """A product of rows with a weight, apart from how it is computed."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, in-features, outputs."""

    @property
    def device(self) -> torch.device:
        """Where its tensors lie."""

    @property
    def kind(self) -> tuple[object, ...]:
        """What decides how fast it is computed."""

    @property
    def label(self) -> str:
        """Of its weight, such as "W4"."""

    def corner(self) -> Product:
        """The same of a few outputs of a few rows."""

    def extreme(self) -> Product:
        """A small one of this kind with the largest codes there are: what saturates or overflows shows here."""

    def exact(self) -> tuple[Tensor, Tensor]:
        """The output in float64, and how far a right one may lie from it."""


@dataclass(frozen=True)
class Candidate:
    """why_not: what keeps it from a product (a package, a shape, a zero point), in a few words; None = nothing."""

    name: str
    run: Callable[[Any], Tensor]
    why_not: Callable[[Any], str | None] = lambda product: None


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


_choices: dict[object, Choice] = {}


def choice_for(product: Product, candidates: Sequence[Candidate], last: Candidate) -> Choice:
    """What computes products of this kind, tried and told at the first of them; while a CUDA graph is recorded, unasked
    the first that may take it.
    """
    if product.kind not in _choices:
        if product.shape[0] == 0 or _is_recorded(product):
            return Choice(next((one for one in candidates if one.why_not(product) is None), last), {}, {})
        with current(product.device):  # events are recorded, and packages launch, on the device that is current
            _choices[product.kind] = choice = choose(product, candidates, last, timed)
        rows, width, outs = product.shape
        logger.info("%d rows, %d to %d features, %s: %s", rows, width, outs, product.label, choice)
    return _choices[product.kind]


def current(device: torch.device) -> Any:
    """A GPU as the current one, whichever was."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _is_recorded(product: Product) -> bool:
    return product.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def choose(product: Product, candidates: Sequence[Candidate], last: Candidate, clock: Clock) -> Choice:
    """Every candidate that can take `product` is tried on a small one of extreme codes and on this one; what fails, or
    lies further from the exact result than rounding explains, is refused; of the rest the one of the fewest seconds.

    last: taken, unasked, where none is left. clock: (call, device) -> seconds of a call. Raises OutOfMemoryError where
    one was in want of memory and none is left: a decoded weight takes more than any of them.
    """
    seconds: dict[str, float] = {}
    short: torch.cuda.OutOfMemoryError | None = None
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
                    seconds[candidate.name] = clock(partial(candidate.run, product), product.device)
            except torch.cuda.OutOfMemoryError as error:  # passes of torch take several times an output
                seconds.pop(candidate.name, None)
                short, reason = error.with_traceback(None), "it takes more memory than is free"  # a trace holds tensors
            except Exception as error:  # of another library: whatever it is, it is not taken
                seconds.pop(candidate.name, None)
                reason = f"it fails ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        if reason is not None:
            refused[candidate.name] = reason
    if short is not None and not seconds:
        raise short
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


def disagreement(out: Tensor, product: Product) -> float:
    """The largest error of an output of `product` in units of what it may be; above 1 it is wrong."""
    expected, bound = product.exact()
    error = ((out.double() - expected).abs() / bound).nan_to_num(torch.inf, torch.inf, torch.inf)
    return float(torch.where(expected.isnan() & out.isnan(), 0.0, error).max())


def timed(call: Callable[[], object], device: torch.device) -> float:
    """The least of a few repeats, by the device's own clock on a GPU."""
    for _ in range(WARM_UP):
        call()
    if device.type != "cuda":
        return min(_elapsed(call) for _ in range(REPEATS))
    torch.cuda._sleep(AHEAD)
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
