"""Run one experiment, or with -m a sweep: `python run.py experiment=w4a8_ts_smooth` (see --help)."""

import sys

from viditq import cli
from viditq.ending import leave
from viditq.program import run

if __name__ == "__main__":
    sys.argv[0] = "run.py"
    leave(lambda: cli.guarded_main(run))
