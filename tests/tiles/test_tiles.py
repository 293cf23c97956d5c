"""The kernels' AMX code on tiles in plain C++: what no CPU without AMX could run otherwise."""

import shlex
import subprocess
from pathlib import Path

import pytest
import torch

import viditq
from viditq import kernels
from viditq.models.native import op

HERE, PACKAGE = Path(__file__).parent, Path(viditq.__file__).parent
LINEAR, ATTENTION = PACKAGE / "quant/execution/backends/native", PACKAGE / "models/native"


def ran(source: str, folder: Path, flags: list[str], target: Path) -> str:
    """What the program of `source` with `folder`'s headers prints; reads past the end of an array end it."""
    try:
        command, version = kernels.compiler()
    except kernels.CannotBuild as reason:
        pytest.skip(str(reason))
    if "clang" in version:
        pytest.skip("clang's tile intrinsics are no macros")
    program = target / "program"
    build = [*command, "-std=c++20", "-O1", "-w", *flags, f"-I{HERE}", f"-I{folder}", str(HERE / source)]
    for sanitizer in (["-fsanitize=address"], []):  # its library is a package of its own on some systems
        made = subprocess.run([*build, *sanitizer, "-o", str(program)], capture_output=True, text=True)
        if made.returncode == 0:
            break
    assert made.returncode == 0, f"{shlex.join(build)}\n{made.stderr}"
    run = subprocess.run([str(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.strip()


def test_the_product_of_linears_is_exact(tmp_path: Path) -> None:
    assert ran("product.cpp", LINEAR, [], tmp_path) == "exact"


@pytest.mark.skipif(op.missing() is not None, reason=f"needs {op.missing()}")
def test_the_products_of_attention(tmp_path: Path) -> None:
    include = Path(torch.__file__).parent / "include"
    flags = [*(f"-m{name}" for name in op.COMPILED), f"-I{include}", "-DC10_USING_CUSTOM_GENERATED_MACROS"]
    assert ran("attention.cpp", ATTENTION, flags, tmp_path) == "right"
