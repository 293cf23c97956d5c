"""Several processes on this machine for one run, started and watched by torch's elastic agent."""

import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from viditq.errors import AlreadyReported, UserError

AGAIN = "Finished work is kept: run the same command again."


@contextmanager
def kept_signals() -> Iterator[None]:
    """Puts back the handlers of signals that the agent replaces for good: a later run of this process needs its own."""
    names = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {name: signal.getsignal(name) for name in names}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():  # in others the agent replaces none either
            for name, handler in before.items():
                signal.signal(name, signal.SIG_DFL if handler is None else handler)


def launch(config: str, folder: Path, count: int) -> None:
    """Run the stages of `config` (yaml, resolved) in `folder` with `count` processes; returns when all are done.

    When one process ends early the others are stopped. Raises AlreadyReported if it said why, UserError if it could
    not (a signal). A signal to this process itself ends all and then goes to the handler it had.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # says it in its own way, at length
    setting = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=f"viditq-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        shutdown_timeout=10,
    )
    ended_by: signal.Signals | None = None
    with kept_signals(), tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "config.yaml"
        file.write_text(config)
        try:
            elastic_launch(setting, sys.executable)("-m", "viditq.worker", str(file), str(folder), str(os.getpid()))
        except SignalException as error:
            ended_by = error.sigval
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode >= 0:
                raise AlreadyReported from None
            name = signal.Signals(-failure.exitcode).name
            why = " (the system's memory may be full)" if name == "SIGKILL" else ""
            raise UserError(f"Process {rank} of {count} was ended by {name}{why}. {AGAIN}") from None
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    if ended_by is not None:
        signal.raise_signal(ended_by)
