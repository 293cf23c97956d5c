"""The tests that need a CUDA device, on one that is simulated: where tensors lie, not what a GPU makes of them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from simulated_cuda.device import build

from viditq import kernels

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        command, _ = kernels.compiler()
    except kernels.CannotBuild as reason:
        pytest.skip(str(reason))
    return build(command, tmp_path_factory.mktemp("device"))


def ran(library: Path, marked: str) -> int:
    """How many tests pass of those so marked; fails if one does not."""
    python = [sys.executable, "-m", "pytest", "-p", "simulated_cuda.plugin", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*python, "-m", marked, str(TESTS / "test_gpu.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
        | {"VIDITQ_SIMULATED_CUDA": str(library), "PYTEST_ADDOPTS": ""},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout[-2000:]
    return int(passed[1])


def test_what_needs_a_gpu(library: Path) -> None:
    assert ran(library, "gpu and not slow") >= 6


@pytest.mark.slow  # every method, and the kernels of a whole model in triton's interpreter: four minutes
def test_what_needs_a_gpu_and_takes_long(library: Path) -> None:
    assert ran(library, "gpu and slow") >= 20
