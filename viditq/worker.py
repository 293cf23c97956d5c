"""One of the processes that `launch` starts: `python -m viditq.worker CONFIG FOLDER LAUNCHER`."""

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from viditq.parent import end_with_parent

if TYPE_CHECKING:
    from omegaconf import DictConfig


def run(cfg: "DictConfig", folder: Path) -> None:
    """The stages of a run whose folder the launching process holds."""
    from viditq.memory import importing, keep_heap, set_aside

    with importing():
        from viditq.engine.processes import joined
        from viditq.experiment import build
        from viditq.run_dir import RunDir
        from viditq.runner import quiet_libraries, run_stages

    set_aside()
    keep_heap()
    quiet_libraries()
    experiment = build(cfg)
    with joined() as processes:
        run_stages(experiment, RunDir(folder, experiment.tracked), processes)


if __name__ == "__main__":
    # Ctrl-C reaches all processes at once, and the launcher says so; what takes long to import comes after this.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_parent()  # a launcher that is killed cannot stop its processes, so the system does
    if os.getppid() != int(sys.argv[3]):
        sys.exit("the launcher of this process is gone")  # killed before this process could ask for the above
    from omegaconf import DictConfig, OmegaConf

    from viditq import cli

    config = OmegaConf.load(sys.argv[1])
    assert isinstance(config, DictConfig)
    work = partial(run, config, Path(sys.argv[2]))
    sys.exit(cli.guarded(config, work))
