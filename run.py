"""Run one experiment, or with -m a sweep: `python run.py experiment=w4a8_ts_smooth` (see --help)."""

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from viditq import cli, config

config.register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    cli.guarded_run(cfg, Path(HydraConfig.get().runtime.output_dir))


if __name__ == "__main__":
    sys.argv[0] = "run.py"
    sys.exit(cli.guarded_main(main))
