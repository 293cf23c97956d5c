"""A process that must not outlive the one that started it; imports nothing that takes long."""

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1  # of prctl(2)


def end_with_parent() -> None:
    """From now on the system kills this process when its parent ends, however that ends (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
