"""Memory that nothing uses any more, given back to the system."""

import atexit
import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


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
