"""Hydra's own sweeper for a sweep that is itself chosen as an experiment and sweeps over experiments."""

from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper


class Grid(BasicSweeper):
    """Every combination of `params`; a key on the command line replaces the one here, but for `experiment`.

    The command line's experiment is the sweep (`experiment=bench`), so the jobs' own ones come from `params`.
    """

    def sweep(self, arguments: list[str]) -> Any:
        """Run the jobs."""
        assert self.config is not None
        if "experiment" in self.params:
            # what says that this is a sweep goes with the experiment: the jobs have to be told
            self.config.hydra.overrides.hydra.append("hydra.mode=MULTIRUN")
            arguments = [text for text in arguments if text.partition("=")[0] != "experiment"]
        return super().sweep(arguments)
