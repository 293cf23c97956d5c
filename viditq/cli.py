"""Errors a user can mend end in one message and exit status 2; `debug=true` shows the traceback."""

import errno
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
)
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from viditq.config import COMMAND_VARIABLE
from viditq.errors import AlreadyReported, GateFailed, UserError

ELSEWHERE = "Choose another with hydra.run.dir=FOLDER and cache_dir=FOLDER"
DISK_ERRORS = {
    errno.ENOSPC: "the disk is full. Finished work is kept: free space and run the same command again",
    errno.EDQUOT: "the disk quota is used up. Finished work is kept: free space and run the same command again",
    errno.EROFS: f"the folder is read-only. {ELSEWHERE}",
    errno.EACCES: f"no permission to write there. {ELSEWHERE}",
    errno.EPERM: f"no permission to write there. {ELSEWHERE}",
    errno.ENOTDIR: f"a file is where a folder has to be. {ELSEWHERE}",
    errno.EEXIST: f"a file is where a folder has to be. {ELSEWHERE}",
}
ALL_KEYS = "`python run.py --cfg job` (with the same choices) shows every key, `--help` the choices of each group."


class JobFailed(Exception):
    """A job of a sweep ended in a user error, whose message is on stderr already; the other jobs go on."""


def guarded_main(hydra_main: Callable[[], None]) -> int:
    """Compose and run; the exit status. What goes wrong before or around a run gets its message here."""
    debug = "debug=true" in sys.argv or os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ[COMMAND_VARIABLE] = " ".join(word for word in sys.argv[1:] if not word.startswith("-"))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise instead of printing in its own way
    try:
        hydra_main()
    except JobFailed:
        return 2
    except Exception as error:
        message = user_message(error)
        if message is None or debug:
            raise
        print_error(message)
        return 2
    return 0


def guarded_run(cfg: DictConfig, folder: Path) -> None:
    """`runner.run` with its errors as an exit status and a message, or JobFailed in a sweep."""
    from viditq.runner import run, sweep_name

    status = guarded(cfg, lambda: run(cfg, folder))
    if status and sweep_name() is not None:
        raise JobFailed
    if status:
        sys.exit(status)


def guarded(cfg: DictConfig, work: Callable[[], object]) -> int:
    """Exit status of `work`: 0, 2 for an error that a user can mend, 3 for a failed gate; the message is on stderr."""
    from viditq.engine.processes import lost_peer

    try:
        work()
    except AlreadyReported:
        return 2
    except GateFailed as error:
        print(f"\ngate failed\n{error}", file=sys.stderr)
        return 3
    except Exception as error:
        if lost_peer(error):
            return 2
        message = user_message(error)
        if message is None or cfg.debug:
            raise
        print_error(message)
        return 2
    return 0


def print_error(message: str) -> None:
    """One message on stderr."""
    print(f"\nerror: {message}", file=sys.stderr)


def user_message(error: BaseException) -> str | None:
    """The message for the user if `error` is one a user can mend, else None (a bug: show the traceback)."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if isinstance(link, UserError):
            return str(link)
    for link in chain:
        if isinstance(link, OSError) and link.errno in DISK_ERRORS:
            return f"{link.filename or 'writing'}: {DISK_ERRORS[link.errno]}."
        if "No space left on device" in str(link):
            return f"{DISK_ERRORS[errno.ENOSPC]}."
    if isinstance(error, HydraException | OmegaConfBaseException):
        return config_message(error)
    return None


def config_message(error: BaseException) -> str:
    """Hydra's own message, with the remedy it lacks for unknown and missing keys."""
    text = str(error)
    node = re.search(r"full_key: (\S+)", text)
    where = f"{node[1]}." if node else ""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if isinstance(error, InstantiationException) and unknown:
        return f"Unknown key {where}{unknown[1]}. {ALL_KEYS}"
    if isinstance(error, MissingMandatoryValue) and node:
        return f"{node[1]} has no value. Give one: {node[1]}=..."
    if isinstance(error, MissingConfigException):
        return text.split("Config search path")[0].rstrip()  # lists the choices
    if isinstance(error, ConfigCompositionException):
        cause = f" {str(error.__cause__).splitlines()[0].rstrip('.')}." if error.__cause__ else ""
        return f"{text.splitlines()[0].rstrip('.')}.{cause} {ALL_KEYS}"
    return text
