"""How the process of a command ends: with its work, by Ctrl-C, by SIGTERM."""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from viditq.config import first_process

SIGNALS: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}  # that end a run in order
GOES_ON = "Finished work is kept: the same command goes on from there.\n"
STOPPED = f"\nstopped by {{}}. {GOES_ON}"
STOPPING = f"\nstopped by {{}}, after this batch; told again, at once. {GOES_ON}"


def leave(main: Callable[[], int]) -> NoReturn:
    """End this process with the status of `main`, once threads have ended and what is registered for the end is done.

    Python would then take apart a million objects of the imported libraries one by one, for 2 seconds and more.
    """
    try:
        status: Any = main()
    except SystemExit as error:
        status = error.code
    if not isinstance(status, int) or sys.flags.inspect or _is_watched():
        sys.exit(status)  # a message; or somebody looks at what is there, at the end
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):  # nobody reads it, or the disk is full
        sys.exit(status)  # Python says so
    os._exit(status)


def _is_watched() -> bool:
    """Whether a profiler, a debugger or the like has something to say at the end."""
    monitoring = getattr(sys, "monitoring", None)  # from Python 3.12 on, with 6 places for tools
    tools = [] if monitoring is None else [monitoring.get_tool(place) for place in range(6)]
    return any((sys.getprofile(), sys.gettrace(), *tools))


def stop(number: int, frame: FrameType | None) -> None:
    """At Ctrl-C or SIGTERM: say so and exit with status 130 or 143, after files are closed and locks let go of; again,
    and at once.

    SystemExit, not KeyboardInterrupt: the latter makes Lightning exit with status 1. While Lightning goes through
    batches it takes SIGTERM itself, before it is told here, and stops after one of them: what was summed up is saved.
    """
    taken = signal.getsignal(number) is not stop
    signal.signal(number, signal.SIG_DFL)
    if first_process():
        said = STOPPING if taken else STOPPED
        os.write(2, said.format(SIGNALS[number]).encode())  # print may be in the middle of a line
    if not taken:
        sys.unraisablehook = _leave_at_once
        raise SystemExit(128 + number)


def _leave_at_once(lost: "sys.UnraisableHookArgs") -> None:
    """Where `stop` met a destructor, which swallows exceptions: as after a kill, the next run tidies up."""
    if isinstance(lost.exc_value, SystemExit):
        os._exit(int(str(lost.exc_value)))
    sys.__unraisablehook__(lost)
