"""Errors a user can mend end in one message and exit status 2; `debug=true` shows the traceback."""

import errno
import sys
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from viditq.errors import UserError

DISK_ERRORS = {
    errno.ENOSPC: "the disk is full. Finished work is kept: free space and run the same command again",
    errno.EDQUOT: "the disk quota is used up. Finished work is kept: free space and run the same command again",
    errno.EROFS: "the folder is read-only. Choose another with hydra.run.dir=FOLDER and cache_dir=FOLDER",
    errno.EACCES: "no permission to write there. Choose another with hydra.run.dir=FOLDER and cache_dir=FOLDER",
}


def guarded_run(cfg: DictConfig, folder: Path) -> None:
    """`runner.run`, with user errors turned into a message on stderr and exit status 2."""
    from viditq.runner import run

    try:
        run(cfg, folder)
    except Exception as error:
        message = user_message(error)
        if message is None or cfg.debug:
            raise
        print(f"\nerror: {message}", file=sys.stderr)
        sys.exit(2)


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
        return str(error)
    return None
