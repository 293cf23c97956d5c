"""What a process leaves behind at its end."""

import gc
import subprocess
import sys
from importlib.util import find_spec

import pytest

from viditq.memory import importing

SET_ASIDE = "import triton; from viditq.memory import set_aside; set_aside()"


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_what_was_set_aside_is_not_reported_as_leaked_by_triton() -> None:
    done = subprocess.run([sys.executable, "-c", SET_ASIDE], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_nothing_is_collected_while_libraries_are_imported_and_afterwards_as_before() -> None:
    for on in (True, False):
        gc.enable() if on else gc.disable()
        try:
            with pytest.raises(ImportError), importing():
                assert not gc.isenabled()
                raise ImportError
            assert gc.isenabled() == on
        finally:
            gc.enable()
