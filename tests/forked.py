"""`run.py`, or lines of Python, in a fork of a process that has only imported it, which takes many seconds.

It has run no test. The tests' own process is not what is forked: whatever its thousands of tests have left there,
threads' locks among it, would be in the run.
"""

import atexit
import os
import runpy
import signal
import sys
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Forked:
    """`run.py ARGUMENTS...`, with what it prints in the files `<name>.out` and `<name>.err` of a folder.

    here: a folder to start in, where it is `viditq ARGUMENTS...`; with code, lines of Python with these arguments.
    """

    def __init__(
        self, folder: Path, name: str, *arguments: str, here: Path | None = None, code: str | None = None
    ) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(["viditq.runner"])
        self._files = [folder / f"{name}.{end}" for end in ("out", "err")]
        self.process: ForkServerProcess = context.Process(target=_run, args=(self._files, arguments, here, code))
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def ended(self, timeout: float = 300) -> tuple[int, str, str]:
        """Exit status (negative: a signal's number), standard output and standard error."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, "it still runs"
        out, err = (file.read_text() for file in self._files)
        return self.process.exitcode, out, err

    def report(self) -> str:
        """What `ended` returns, as text: pytest would cut a tuple in its middle, where the reason stands."""
        return "\n".join(map(str, self.ended()))


def _run(files: list[Path], arguments: tuple[str, ...], here: Path | None, code: str | None) -> None:
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    atexit._clear()  # what the tests' process registered is not for this one
    os.chdir(here or ROOT)
    if code is not None:
        sys.argv = ["-c", *arguments]
        exec(compile(code, "code", "exec"), {"__name__": "__main__"})
    elif here is not None:
        from viditq.program import main

        sys.exit(main([*arguments]))
    else:
        sys.argv = ["run.py", *arguments]
        runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
