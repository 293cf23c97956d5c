"""Errors a user can mend end in one message and exit status 2; `debug=true` shows the traceback."""

import errno
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from viditq import log_file
from viditq.checkpoints import known_of
from viditq.checks import check, check_values_alone
from viditq.conf_folder import CONF
from viditq.config import ALL_KEYS, COMMAND_VARIABLE, first_process, only_estimates, program
from viditq.ending import SIGNALS, stop
from viditq.errors import AlreadyReported, GateFailed, UserError, close_names, extra_command, quoting
from viditq.files import read_json
from viditq.finished import find_finished
from viditq.memory import importing, keep_heap, set_aside
from viditq.out_of_memory import is_about_memory, memory_message
from viditq.run_dir import CHOICE, RunDir
from viditq.sweeps.records import SWEEP_VARIABLE, JobRecord, current_job, exit_status, planned_jobs, read_jobs

ELSEWHERE = "Choose another with {choice}"
FOLDERS, SWEEP_FOLDERS = f"{CHOICE} and cache_dir=FOLDER", "hydra.sweep.dir=FOLDER and cache_dir=FOLDER"
DISK_ERRORS = {
    errno.ENOSPC: "the disk is full. Finished work is kept: free space and run the same command again",
    errno.EDQUOT: "the disk quota is used up. Finished work is kept: free space and run the same command again",
    errno.EROFS: f"the folder is read-only. {ELSEWHERE}",
    errno.EACCES: f"no permission to write there. {ELSEWHERE}",
    errno.EPERM: f"no permission to write there. {ELSEWHERE}",
    errno.ENOTDIR: f"a file is where a folder has to be. {ELSEWHERE}",
    errno.EEXIST: f"a file is where a folder has to be. {ELSEWHERE}",
    errno.ENAMETOOLONG: f"the name is too long. {ELSEWHERE}",
    errno.EISDIR: f"a folder is where a file has to be. {ELSEWHERE}",
}
JOB_DIED = {"TerminatedWorkerError", "BrokenProcessPool", "UncompletedJobError"}  # joblib's and submitit's
REPORTED = "another of the run's processes failed, whose message is above"
RUNS = ("-m", "--multirun")  # options with which the command still is a run; others print what others read
SHOWS = ("--help", "-h", "--cfg", "-c", "--info", "-i")  # instead of a run
ONE_RUN = "--help, --cfg and --info show one configuration: leave -m out, and give each key one value, such as {}."
LOADING = "viditq: loading torch, diffusers and Lightning (10 s, more on a busy machine or the first time)"


def guarded_main(hydra_main: Callable[[], None]) -> int:
    """Compose and run; the exit status. What goes wrong before or around a run gets its message here.

    A sweep ends with a table of its jobs, whatever became of them; its status is that of `sweep.exit_status`.
    """
    for number in SIGNALS:
        signal.signal(number, stop)
    if first_process() and all(word in RUNS for word in sys.argv[1:] if word.startswith("-")):
        print("viditq: reading the configuration", flush=True)
    debug = "debug=true" in sys.argv or os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ[COMMAND_VARIABLE] = " ".join(word for word in sys.argv[1:] if not word.startswith("-"))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise instead of printing in its own way
    os.environ.pop(SWEEP_VARIABLE, None)
    status = 0
    try:
        hydra_main()
    except Exception as error:
        message = user_message(error, SWEEP_FOLDERS if SWEEP_VARIABLE in os.environ else FOLDERS)
        if message is None or debug:
            raise
        print_error(message)
        status = 2
    finally:
        jobs = summary_of_sweep(shlex.join([*program(), *sys.argv[1:]]))
    if jobs == [] and SWEEP_VARIABLE in os.environ and not status:
        print_error("The sweep has no jobs: one of its keys has no values.")
        status = 2
    return status or exit_status(jobs)


def summary_of_sweep(command: str) -> list[JobRecord] | None:
    """Print what became of the jobs, if this was a sweep; None where a record of one is damaged, which is said.

    command: that goes on with the sweep.
    """
    folder = os.environ.get(SWEEP_VARIABLE)
    try:
        jobs = read_jobs(Path(folder)) if folder else []
    except UserError as error:
        print_error(str(error))
        return None
    if folder and jobs and first_process():
        from viditq.sweeps.table import print_sweep

        print_sweep(Path(folder), jobs, planned_jobs(), command)
    return jobs


def guarded_run(cfg: DictConfig, folder: Path) -> None:
    """`runner.run` with its errors as an exit status and a message; in a sweep they go into the job's record."""
    job = current_job(folder)
    if job is not None and signal.getsignal(signal.SIGINT) is not stop:  # in a process that a launcher has started
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def work() -> Any:
        alone = check_values_alone(cfg)
        if finished := find_finished(cfg, folder, alone.stages):
            from viditq.console import tell_finished

            return tell_finished(finished, alone.stages, RunDir(folder, {}), alone.gate)
        if first_process():
            print(LOADING, flush=True)
        with importing():
            checked = check(cfg, alone)
            from viditq.runner import run  # takes many seconds, which neither a bad value nor a finished run waits for

        set_aside()
        keep_heap()
        return run(cfg, folder, checked=checked)

    status = guarded(cfg, work, job)
    log_file.keep_in(None)
    if job is None and first_process() and (status or only_estimates(cfg)):
        log_file.remove_unused(folder)
    if status and job is None:
        sys.exit(status)


def guarded(cfg: DictConfig, work: Callable[[], Any], job: JobRecord | None = None, choice: str = FOLDERS) -> int:
    """Exit status of `work`: 0, 3 if it is complete but fails its gate, 2 for an error that a user can mend.

    The message is on stderr. A bug is raised, but not in a sweep, where the other jobs go on: there it is one more
    failure, with its traceback, and `job` records what became of this one. choice: as in `user_message`.
    """
    try:
        metrics = work()
    except SystemExit as error:
        if job is not None and isinstance(error.code, int) and error.code - 128 in SIGNALS:
            job.interrupted(SIGNALS[error.code - 128])
        raise
    except GateFailed as error:
        print(f"\ngate failed\n{error}", file=sys.stderr)
        if job is not None:
            job.done(read_json(Path(job.folder) / "metrics.json"), str(error).splitlines())
        return 3
    except Exception as error:
        message: str | None = REPORTED
        if isinstance(error, RuntimeError) and _lost_peer(error):
            print(f"\n{REPORTED} ({str(error).splitlines()[0]})", file=sys.stderr)
        elif not isinstance(error, AlreadyReported):
            message = user_message(error, choice)
            if job is None and (message is None or cfg.debug):
                raise
            if message is None or cfg.debug:
                traceback.print_exc()
            message = message or f"{type(error).__name__}: {error}"
            print_error(message)
        if job is not None:
            job.failed(str(message))
        return 2
    if job is not None:
        job.done(metrics)
    return 0


def _lost_peer(error: RuntimeError) -> bool:
    from viditq.engine.processes import lost_peer  # imports Lightning, as everything that raises such errors does

    return lost_peer(error)


def print_error(message: str) -> None:
    """One message on stderr."""
    print(f"\nerror: {message}", file=sys.stderr)
    log_file.add(f"\nerror: {message}")


def user_message(error: BaseException, choice: str = FOLDERS) -> str | None:
    """The message for the user if `error` is one a user can mend, else None (a bug: show the traceback).

    choice: what chooses another folder or file on the command line.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and not any(link is seen for seen in chain):  # a chain may bite its own tail
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if isinstance(link, UserError):
            return str(link)
    for link in chain:
        if isinstance(link, OSError) and link.errno in DISK_ERRORS:
            return f"{link.filename or 'writing'}: {DISK_ERRORS[link.errno].format(choice=choice)}."
        if "No space left on device" in str(link):
            return f"{DISK_ERRORS[errno.ENOSPC]}."
        if is_about_memory(link):
            return memory_message(str(link))
    if type(error).__name__ in JOB_DIED:
        why = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        remedy = "The same command continues, with the jobs that had not started; fewer at once need less memory."
        return f"The process of a job died, which ended the sweep: {why}. {remedy}"
    if isinstance(error, HydraException | OmegaConfBaseException):
        return config_message(error)
    if isinstance(error, YAMLError):
        return f"A configuration file is no yaml:\n{error}"
    if isinstance(error, ValueError) and str(error).startswith("Only one of --run, --multirun"):
        return ONE_RUN.format("seed=0")
    if isinstance(error, ValueError) and str(error).startswith("Config group override must be"):
        return f"A group (such as logger) cannot be null: choose one of its options, such as logger=none. {ALL_KEYS}"
    return None


def config_message(error: BaseException) -> str:
    """Hydra's own message, with the remedy it lacks for unknown and missing keys."""
    text = str(error)
    node = re.search(r"full_key: (\S+)", text)
    where = f"{node[1]}." if node else ""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if isinstance(error, InstantiationException) and unknown:
        return f"Unknown key {where}{unknown[1]}. {ALL_KEYS}"
    if isinstance(error, OverrideParseException):
        return f"{text.rstrip()}\n{quoting(error.override)}"
    if ambiguous := re.search(r"Ambiguous value for argument '(.*)'", text):
        if any(word.partition("=")[0] in SHOWS for word in sys.argv[1:]):
            return f"{ambiguous[1]} is a sweep. {ONE_RUN.format(ambiguous[1].split(',')[0])}\n{quoting(ambiguous[1])}"
        return f"{text.rstrip()}\n{quoting(ambiguous[1])}"
    if isinstance(error, MissingMandatoryValue) and node:
        return f"{node[1]} has no value. Give one: {node[1]}=..."
    if isinstance(error, MissingConfigException):
        extra = f"joblib and submitit come with an extra: {extra_command('sweeps')}."
        choices = text.split("Config search path")[0].rstrip()
        group = Path(error.missing_cfg_file or "").parent
        if group.parent == Path("model"):
            return f"There is no {error.missing_cfg_file}.{known_of(str(error.missing_cfg_file).partition('/')[2])}"
        if error.options is None and (CONF / group).is_dir():
            choices += f" Known are {', '.join(sorted(file.stem for file in (CONF / group).glob('*.yaml')))}."
        if near := _near(Path(error.missing_cfg_file or "").name, error.options or ()):
            choices += f"\n{near}"
        return f"{choices}\n{extra}" if "'hydra/launcher/" in text else choices
    if isinstance(error, ConfigCompositionException):
        cause = f" {str(error.__cause__).splitlines()[0].rstrip('.')}." if error.__cause__ else ""
        parent, key = (getattr(error.__cause__, name, None) for name in ("parent_node", "key"))
        near = ""
        if isinstance(parent, DictConfig):  # which a key that is unknown was looked for in
            groups = [] if parent._get_parent() else [path.name for path in CONF.iterdir() if path.is_dir()]
            near = _near(str(key), [*map(str, parent), *groups])
        return f"{text.splitlines()[0].rstrip('.')}.{cause}{f' {near}.' * bool(near)} {ALL_KEYS}"
    return text


def _near(name: str, known: Iterable[str]) -> str:
    """`close names: ...` where some are; a list of all is for the message to make."""
    found = close_names(name, known)
    return found if found.startswith("close") else ""
