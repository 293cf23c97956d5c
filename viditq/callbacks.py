"""What Hydra calls before it writes anything."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

from viditq.cli import print_error, user_message
from viditq.run_dir import check_folder, check_place


class RunFolder(Callback):
    """Expands `~` in the folder of a run or of a sweep, and ends the command where no run may write to it."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        HydraConfig.instance().set_config(config)  # the folder's default is made of it
        self._check(config, "hydra.run.dir", check_place)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._check(config, "hydra.sweep.dir", lambda place: check_folder(place, "hydra.sweep.dir=FOLDER"))

    def _check(self, config: DictConfig, key: str, check: Callable[[str], Path]) -> None:
        try:
            place = str(OmegaConf.select(config, key) or "")
            folder = check(place)
        except Exception as error:  # Hydra would only warn of it, and go on
            message = user_message(error)
            if message is None:
                raise
            print_error(message)
            sys.exit(2)
        if place.startswith("~"):
            with read_write(config.hydra):
                OmegaConf.update(config, key, str(folder))
