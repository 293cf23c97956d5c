"""Hydra's own sweeper for a sweep that is itself chosen as an experiment and sweeps over experiments."""

from collections.abc import Mapping
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from omegaconf import OmegaConf

from viditq.errors import UserError

WHERE = "hydra.sweeper."


class Grid(BasicSweeper):
    """Every combination of `params`; a key on the command line replaces the one here, but for `experiment`.

    The command line's experiment is the sweep (`experiment=bench`), so the jobs' own ones come from `params`.
    """

    def sweep(self, arguments: list[str]) -> Any:
        """Run the jobs. Raises UserError for settings that no job can be made of."""
        assert self.config is not None
        self.check()
        if "experiment" in self.params:
            # what says that this is a sweep goes with the experiment: the jobs have to be told, and have no `params`
            overrides = [text for text in self.config.hydra.overrides.hydra if not text.lstrip("+~").startswith(WHERE)]
            self.config.hydra.overrides.hydra = [*overrides, "hydra.mode=MULTIRUN"]
            arguments = [text for text in arguments if text.partition("=")[0] != "experiment"]
        return super().sweep(arguments)

    def check(self) -> None:
        """Raises UserError unless every key has values and the size of batches is one."""
        size: Any = self.max_batch_size
        if size is not None and (type(size) is not int or size < 1):
            raise UserError(f"{WHERE}max_batch_size={size}. Give a whole number of 1 or more, or null for all jobs.")
        params: Any = OmegaConf.to_container(self.params) if OmegaConf.is_config(self.params) else self.params
        if not isinstance(params, Mapping) or not params:
            given = "is empty" if not params else f"= {params} holds no keys"
            raise UserError(
                f"{WHERE}params {given}: nothing to sweep over. See conf/experiment/bench.yaml for its form."
            )
        for key, value in params.items():
            if not isinstance(value, str | int | float) or not str(value).strip():
                where = f"{WHERE}params.{key}"
                several = f"""'{where}="one,another"'"""
                raise UserError(f"{where}={value}: give one value, or several in quotes: {several}.")
