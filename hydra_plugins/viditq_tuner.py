"""The tuner as a Hydra sweeper; Hydra takes sweepers from the package hydra_plugins only, and imports all of it."""

import os
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from viditq.errors import UserError


class Tuner(Sweeper):
    """Launches what `viditq.sweeps.tuning.tune` proposes, through whichever launcher is configured."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `sweep`."""
        self.config, self.hydra_context = config, hydra_context
        arguments = {"hydra_context": hydra_context, "task_function": task_function, "config": config}
        self.launcher = Plugins.instance().instantiate_launcher(**arguments)

    def sweep(self, arguments: list[str]) -> None:
        """Run the study; `arguments` are the command line's overrides, which all trials share."""
        from viditq.sweeps.records import SWEEP_VARIABLE
        from viditq.sweeps.tuning import Tuning, key_of, tune

        assert self.launcher is not None
        swept = [o for o in OverridesParser.create().parse_overrides(arguments) if o.is_sweep_override()]
        if swept:
            raise UserError(f"{swept[0].input_line}: a tuning takes one value. Start one command for each.")
        settings = {k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in self.settings.items()}
        tuning = Tuning.parse(settings)
        if tuning.objective not in self.config.metric:
            choices = ", ".join(self.config.metric)
            raise UserError(
                f"hydra.sweeper.objective={tuning.objective} is not measured here. Choose one of {choices}."
            )
        if "evaluate" not in self.config.stages:
            raise UserError(f"stages={self.config.stages} measures nothing to tune by. Add evaluate.")
        for text in arguments:
            if key_of(text) in tuning.keys:
                raise UserError(f"{text}: this tuning sets {key_of(text)} itself. Leave it out, or add hydra.mode=RUN.")
        tune(tuning, Path(os.environ[SWEEP_VARIABLE]), arguments, self.launch)

    def launch(self, jobs: list[list[str]], first: int) -> None:
        """Run these jobs to their ends; what became of them is in their records."""
        assert self.launcher is not None
        self.validate_batch_is_legal(jobs)
        for job in self.launcher.launch(jobs, initial_job_idx=first):
            _ = job.return_value  # raises what went wrong around a job, before it could be recorded
