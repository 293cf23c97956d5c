"""`viditq`, the console command: a run or sweep as run.py's, or one of the other commands (export, which, ...)."""

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from viditq import cli, config
from viditq.conf_folder import CONF
from viditq.ending import leave
from viditq.errors import close_names

config.register()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def run(cfg: DictConfig) -> None:
    """One run, or a job of a sweep."""
    cli.guarded_run(cfg, Path(HydraConfig.get().runtime.output_dir))


def command() -> NoReturn:
    """What the console command calls."""
    leave(main)


def main(words: list[str] | None = None) -> int:
    """The exit status. words: of the command line; what begins with none of COMMANDS is Hydra's."""
    if words is None:
        words = sys.argv[1:]
        os.environ[config.PROGRAM_VARIABLE] = "viditq"
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)  # a user's own metric or model class, as with `python run.py` or `python -m`
    if words == ["--version"]:
        print(f"viditq {version('viditq')}")
        return 0
    if words and words[0] in config.COMMANDS:
        from viditq import commands  # a run has no use for them

        try:
            found = commands.main(words)
            sys.stdout.flush()
        except BrokenPipeError:  # `viditq layers ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        if isinstance(found, int):
            return found
        words = found
    elif words and words[0].isidentifier():  # Hydra would ask for quotes
        known = close_names(words[0], config.COMMANDS)
        cli.print_error(f"There is no command {words[0]!r}; {known}. A run takes KEY=VALUE: viditq experiment=w4a8.")
        return 2
    sys.argv = ["viditq", *words]
    return cli.guarded_main(run)
