"""One run, top to bottom: build the objects, go through the stages, conclude."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from viditq import log_file
from viditq.byte_numbers import num_bytes
from viditq.checks import Checked, check
from viditq.config import COMMAND_VARIABLE
from viditq.console import conclude, doing, print_heading, print_stage, show_lines, terminal
from viditq.engine.launch import launch
from viditq.engine.logged_run import LoggedRun, follows, logged
from viditq.engine.processes import Processes, environment, joined
from viditq.engine.progress import Progress, about, following
from viditq.engine.threads import sharing_cores
from viditq.engine.wandb_settings import logged_as
from viditq.errors import UserError
from viditq.estimate import estimate
from viditq.estimate.fit import propose
from viditq.estimate.fit_table import show_fit
from viditq.estimate.table import show
from viditq.experiment import Experiment, build
from viditq.files import is_whole, read_json, write_json
from viditq.forecast import forecast
from viditq.job import Job
from viditq.models.checks import GUESSED
from viditq.models.contents import parts_by_variant
from viditq.models.roles import FLOAT, counts, of_sound, summary
from viditq.out_of_memory import expected, is_about_memory, memory_message
from viditq.provenance import command
from viditq.quant.description.policy import PlanFile
from viditq.quant.search.policy import SensitivitySearch
from viditq.run_dir import CHOICE, RunDir, flatten
from viditq.run_name import shorten
from viditq.settled import remember
from viditq.stages import FUNCTIONS
from viditq.stages.order import check_order
from viditq.stages.search_table import search_metrics
from viditq.sweeps.gathered import width_of
from viditq.trial import try_metrics

GROUP_VARIABLE = "VIDITQ_GROUP"  # of the run's logger; processes with an argv of their own inherit it
LONGEST_TAG = 64  # that W&B takes


def run(cfg: DictConfig, folder: Path, choice: str = CHOICE, checked: Checked | None = None) -> dict[str, Any] | None:
    """Run the configured stages in `folder`; returns metrics.json's content once it exists (on the first process).

    choice: what chooses another folder on the command line, for messages. checked: as in `experiment.build`.
    Finished work is found on disk and skipped. With trainer.devices above 1 the stages run in processes of their own,
    unless torchrun or srun has started this one as one of several. Raises UserError for bad input, before anything
    slow where possible.
    """
    quiet_libraries()
    checked = check(cfg) if checked is None else checked
    experiment = build(cfg, checked)
    run_dir = RunDir(folder, experiment.tracked, choice, overrides())
    if cfg.estimate:
        tell(experiment, run_dir, cfg.estimate)
        return None
    if (limit := num_bytes(cfg.fit)) is not None:
        tell_fit(experiment, run_dir, limit)
        return None
    count = processes_to_launch(experiment)
    if "evaluate" in experiment.stages and not run_dir.metrics.is_file():
        try_metrics(experiment)
    policy = experiment.quant.policy
    if "search" in experiment.stages and isinstance(policy, SensitivitySearch) and not run_dir.search.is_file():
        search_metrics(experiment, policy)
    with joined() as processes, run_dir.held() if processes.first else nullcontext():
        processes.first_does(run_dir.claim)
        processes.first_does(lambda: check_order(Job(experiment, run_dir)))
        if processes.first:
            log_file.keep_in(folder, command())
        os.environ[GROUP_VARIABLE] = sweep_name() or ""
        if count > 1:
            print(f"viditq: starting {count} processes, each of which loads the same", flush=True)
            launch(OmegaConf.to_yaml(cfg, resolve=True), folder, count)
        else:
            run_stages(experiment, run_dir, processes)
        if not processes.first:
            return None
        told = heading(experiment, run_dir.path, max(count, processes.count))
        remember(cfg, Job(experiment, run_dir), told, checked.since)
        return conclude(terminal(), run_dir, experiment.gate)


def tell(experiment: Experiment, run_dir: RunDir, mode: Any) -> None:
    """Print what the run would need."""
    if sweep_name() is not None:
        raise UserError("estimate tells of one run: leave out -m, and choose no experiment that is a sweep (bench).")
    with sharing_cores() as cores:
        cores.follow()
        show(terminal(), experiment.name, experiment.adapter.name, estimate(Job(experiment, run_dir), mode))


def tell_fit(experiment: Experiment, run_dir: RunDir, limit: int) -> None:
    """Print which settings fit `limit` bytes."""
    if sweep_name() is not None:
        raise UserError("fit tells of one run: leave out -m, and choose no experiment that is a sweep (bench).")
    with sharing_cores() as cores:
        cores.follow()
        show_fit(terminal(), propose(Job(experiment, run_dir), limit), overrides())


def processes_to_launch(experiment: Experiment) -> int:
    """Number of processes that this one has to start; 1 = none, it does the work itself."""
    trainer = experiment.make_trainer()
    if environment() is not None:
        return 1
    if trainer.num_nodes > 1:
        raise UserError(
            f"trainer.num_nodes={trainer.num_nodes}: start one process per device with torchrun or srun "
            "(docs/processes.md), or give trainer.num_nodes=1."
        )
    return trainer.num_devices


def run_stages(experiment: Experiment, run_dir: RunDir, processes: Processes) -> None:
    """All stages in order; called by every process of a run whose folder is held.

    The threads of each process are its share of the cores that are free, looked up at each stage and batch.
    """
    console = terminal(quiet=not processes.first)
    job = Job(experiment, run_dir, processes, say=lambda line: console.print(line, markup=False))
    print_heading(console, heading(experiment, run_dir.path, processes.count))
    with sharing_cores() as cores, logging_run(job) as live, following(Progress(experiment.stages)) as progress:
        progress.listen = live.tell if live else None
        processes.first_does(job.tidy_run)  # all of them are counted by now
        threads = cores.follow()
        console.print(str(threads), markup=False)
        for number, stage in enumerate(experiment.stages, 1):
            before, threads = threads, cores.follow()
            if threads != before:
                console.print(f"      {threads}", markup=False)
            if processes.first:
                progress.begin(number, forecast(job))
                if number == 1 and (left := progress.left()):
                    console.print(f"{about(left)}, as long as earlier runs took", markup=False)
                doing(console, (number, len(experiment.stages)), stage)
            with explained(job, stage):
                told = FUNCTIONS[stage](job)
            print_stage(console, (number, len(experiment.stages)), stage, told)
        log(job, live)


@contextmanager
def explained(job: Job, stage: str) -> Iterator[None]:
    """Where memory does not suffice: UserError with what the stage was to take, and what needs less."""
    try:
        yield
    except Exception as error:
        if not is_about_memory(error):
            raise
        raise UserError(memory_message(str(error), expected(job, stage))) from error


def heading(experiment: Experiment, folder: Path, num_processes: int) -> list[str]:
    """The experiment's name, what it does where, and what the model is made of."""
    with_others = f" in {num_processes} processes" if num_processes > 1 else ""
    return [experiment.name, f" on {experiment.adapter.name}{with_others} -> {folder}", described(experiment)]


def described(experiment: Experiment) -> str:
    """How many Linears the model has by role, and what of them a plan file leaves out; denoisers left in float, parts
    by variant; where it was guessed, also what, so that it can be corrected.
    """
    model, line = experiment.adapter, counts(experiment.roles)
    if sound := of_sound(experiment.roles, model.makes_sound):
        line += f"\n  {sound}"
    if isinstance(experiment.quant.policy, PlanFile):
        left = [n for n, role in experiment.roles.items() if role != FLOAT and n not in experiment.plan.layers]
        if left:
            line += f"\n  {experiment.quant.policy.path} leaves {len(left)} more in float, such as {left[0]}"
    if model.float_denoisers:
        line += f"\n  left in float, as model.float_denoisers asks: {', '.join(model.float_denoisers)}"
    if model.variant:
        taken, plain = parts_by_variant(model)
        parts = f"{', '.join(taken)}; of no variant: {', '.join(plain) or 'none'}" if taken else "to be downloaded"
        line += f"\n  weights of the variant {model.variant}: {parts}"
    if not model.guess:
        return line
    settings = ", ".join(f"model.{key}={getattr(model, key)}" for key in GUESSED)
    patterns = summary({model.bare_name(name): role for name, role in experiment.roles.items()})
    return f"{line}\n  guessed: {settings}\n{patterns}"


def logging_run(job: Job, at_end: bool = False) -> AbstractContextManager[LoggedRun | None]:
    """The run as its logger sees it while the block lasts; None where that has it already, or wants results alone, and
    on all processes but the first.
    """
    e, run_dir = job.experiment, job.run_dir
    if not job.processes.first or e.make_logger is None or logged_as(e.logger_name) in loggers_told(run_dir):
        return nullcontext()
    logger = e.make_logger(run_dir.path, e.name, os.environ.get(GROUP_VARIABLE) or None, run_dir.fingerprint)
    if not at_end and not follows(logger):
        return nullcontext()
    width = width_of(flatten(e.tracked))
    return logged(logger, e.tracked, [tag[:LONGEST_TAG] for tag in (e.adapter.name, e.name, width) if tag])


def log(job: Job, live: LoggedRun | None) -> None:
    """Hand a reported run to its logger, once per kind of logger. live: begun with the run."""
    run_dir = job.run_dir
    name, told = logged_as(job.experiment.logger_name), loggers_told(run_dir)
    if not job.processes.first or not run_dir.metrics.is_file() or not is_whole(run_dir.page) or name in told:
        return
    with (
        nullcontext(live) if live else logging_run(job, at_end=True) as run
    ):  # anew where a stage made the run another one
        if run is not None:
            run.send(run_dir, read_json(run_dir.metrics))
            write_json(run_dir.logged, [*told, name])


def loggers_told(run_dir: RunDir) -> list[str]:
    """Which loggers have the run as it is."""
    return list(read_json(run_dir.logged)) if is_whole(run_dir.logged) else []


def sweep_name() -> str | None:
    """The command line of the multirun this job belongs to: the group of its W&B runs; None for a single run."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return shorten(os.environ[COMMAND_VARIABLE], 120)


def overrides() -> tuple[str, ...]:
    """The words of the command line, as Hydra has taken them; none where the run was called by Python."""
    return tuple(HydraConfig.get().overrides.task) if HydraConfig.initialized() else ()


def quiet_libraries() -> None:
    """Keep what the libraries say at start-up off the terminal; their warnings about errors stay. Ours is shown."""
    import diffusers
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    diffusers.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    show_lines(terminal(quiet=os.environ.get("RANK", "0") != "0"))
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
