"""One run, top to bottom: build the objects, go through the stages, report."""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape

from viditq.config import COMMAND_VARIABLE, shorten
from viditq.console import print_summary
from viditq.engine.logging import log_run
from viditq.experiment import build
from viditq.files import read_json
from viditq.run_dir import RunDir
from viditq.stages import Stages


def run(cfg: DictConfig, folder: Path) -> dict[str, Any] | None:
    """Run the configured stages in `folder`; returns metrics.json's content once it exists.

    Finished work is found on disk and skipped. Raises UserError for bad input, before anything slow where possible.
    """
    quiet_libraries()
    experiment = build(cfg)
    if "evaluate" in experiment.stages and not (folder / "metrics.json").is_file():
        experiment.make_metrics()  # one that cannot be built is seen now, not after hours of sampling
    run_dir = RunDir(folder, experiment.tracked)
    stages = Stages(experiment, run_dir)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{experiment.name}[/bold] on {experiment.adapter.name} -> {escape(str(folder))}")
    to_log = not run_dir.metrics.is_file() or ("report" in experiment.stages and not run_dir.picture.is_file())
    for number, stage in enumerate(experiment.stages, 1):
        console.print(f"[{number}/{len(experiment.stages)}] {stage}: {getattr(stages, stage)()}", markup=False)
    if not run_dir.metrics.is_file():
        return None
    metrics = read_json(run_dir.metrics)
    if to_log and experiment.make_logger is not None:
        logger = experiment.make_logger(folder, experiment.name, sweep_name(), run_dir.fingerprint)
        log_run(logger, experiment.tracked, run_dir, metrics)
    print_summary(console, metrics, run_dir)
    return metrics


def sweep_name() -> str | None:
    """The command line of the multirun this job belongs to: the group of its W&B runs; None for a single run."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return shorten(os.environ[COMMAND_VARIABLE], 120)


def quiet_libraries() -> None:
    """Keep what the libraries say at start-up off the terminal; their warnings about errors stay."""
    import diffusers
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    diffusers.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
