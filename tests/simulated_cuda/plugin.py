"""For pytest: `-p simulated_cuda.plugin` starts the device before any test file imports torch."""

import os
from pathlib import Path

from simulated_cuda.device import start

LIBRARY = "VIDITQ_SIMULATED_CUDA"
start(Path(os.environ[LIBRARY]))
