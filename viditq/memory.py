"""Memory that nothing uses any more: what is kept for the next to come, what is given back to the system."""

import atexit
import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
KEPT = 64 * 2**20  # bytes that the heap keeps at its end
# Blocks from these bytes on lie apart of the heap and go back at once, while models are loaded and while steps are
# computed. Less for the first makes loading slower (0.7 s for 0.6 B at 2 MiB), more leaves holes between weights; the
# second is the most that glibc takes.
LASTING, PASSING = 4 * 2**20, 32 * 2**20
CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")  # by whoever started the process
CHOSEN_TUNABLES = ("glibc.malloc.trim_threshold", "glibc.malloc.mmap_threshold")

_own_heap = False


def keep_heap() -> bool:
    """From now on large weights lie apart of the heap, which keeps what steps free (`reusing`); whether it is so now.

    glibc goes by what was freed last, so that the memory of a run's steps came anew page by page, for up to a fifth of
    their time, or did not, and a loaded model had holes or not. For processes of our own. False with another C
    library, or where the environment says a size.
    """
    global _own_heap
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    chosen = any(os.environ.get(name) for name in CHOSEN) or any(name in tunables for name in CHOSEN_TUNABLES)
    _own_heap = not chosen and _set(M_TRIM_THRESHOLD, KEPT) and _set(M_MMAP_THRESHOLD, LASTING)
    return _own_heap


@contextmanager
def reusing() -> Iterator[None]:
    """While steps are computed: what one frees is there for the next, in processes that called `keep_heap`."""
    if not _own_heap:
        yield
        return
    _set(M_MMAP_THRESHOLD, PASSING)
    try:
        yield
    finally:
        _set(M_MMAP_THRESHOLD, LASTING)


def _set(parameter: int, value: int) -> bool:
    with suppress(OSError, AttributeError):  # another C library
        return bool(ctypes.CDLL(None).mallopt(parameter, value))
    return False


def give_back() -> None:
    """Drop what nothing refers to, and return the free room on the heap, which glibc keeps between what is used."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def importing() -> Iterator[None]:
    """Around the import of large libraries, whose objects stay: `gc` would look through them again and again.

    A fifth of the seconds that torch, diffusers and Lightning take, for 15 MB of garbage that is collected later.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def set_aside() -> None:
    """Let `gc` pass over what is there now, the first time: all that the libraries made when imported.

    Looking through them took a quarter of a second each time a model was let go of. For processes of our own:
    what is garbage now is never collected.
    """
    if not gc.get_freeze_count():
        gc.freeze()
        atexit.register(_take_back)


def _take_back() -> None:
    """Where torch has imported triton: its bindings report whatever Python does not collect at its end as leaked."""
    if "triton" in sys.modules:
        gc.unfreeze()
