"""The tiny random pipelines of tests/models and the exports of tests/export serve here too."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / name) for name in ("models", "export")]
