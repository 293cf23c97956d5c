"""Builds C++ kernels for a CPU on first use and loads them.

A build lies in the user's cache under the hash of all it depends on: sources, flags, compiler, torch. It is made in a
temporary folder and renamed, under a lock that the kernel frees when its holder dies, so neither a killed build nor two
processes at once leave anything wrong behind.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

logger = logging.getLogger("viditq")
LIBRARY = "kernels.so"
FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-shared", "-fopenmp", "-DNDEBUG", "-w", "-fwrapv"),
    *("-fno-math-errno", "-fno-trapping-math", "-mprefer-vector-width=512"),  # rounding and minimum become instructions
)


class CannotBuild(Exception):
    """Kernels cannot be built or loaded on this machine; the message says why, in a few words."""


def load(sources: Sequence[Path], instructions: Sequence[str]) -> None:
    """Registers the operators of kernels with torch, built first if need be.

    sources: the first is compiled, the others are its headers. instructions: names of instruction sets as the compiler
    has them, such as avx512vnni. Raises CannotBuild.
    """
    torch_folder = Path(torch.__file__).parent
    include = torch_folder / "include"
    flags = [
        *(*FLAGS, *(f"-m{name}" for name in instructions)),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"),
        *(f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"),
    ]
    for last in (False, True):
        path = ensure(sources, flags, torch.__version__)
        try:
            torch.ops.load_library(path)
            return
        except OSError as error:  # whole, but of a machine with other libraries: a home folder that is shared
            shutil.rmtree(path.parent, ignore_errors=True)
            if last:
                raise CannotBuild(f"the build does not load ({error})") from error


def check_cpu(instructions: Sequence[str], cpuinfo: Path = Path("/proc/cpuinfo")) -> None:
    """Raises CannotBuild unless the CPU has all of these instruction sets."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        raise CannotBuild("only Linux on x86-64 is supported") from None
    found = set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())
    missing = [name for name in instructions if name not in found and name.replace("avx512", "avx512_") not in found]
    if missing:
        raise CannotBuild(f"this CPU has no {missing[-1] if len(missing) == 1 else ', '.join(missing)}")


def has(instruction: str) -> bool:
    """Whether the CPU has this instruction set, named as for `check_cpu`."""
    try:
        check_cpu((instruction,))
    except CannotBuild:
        return False
    return True


def cache_folder() -> Path:
    """Where builds lie: $XDG_CACHE_HOME/viditq/native, or ~/.cache/viditq/native."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "viditq" / "native"


def compiler() -> tuple[list[str], str]:
    """The command of the C++ compiler ($CXX or the first of g++, c++, clang++) and its version; raises CannotBuild."""
    named = shlex.split(os.environ.get("CXX", ""))
    command = named or next(([name] for name in ("g++", "c++", "clang++") if shutil.which(name)), [])
    if not command or shutil.which(command[0]) is None:
        raise CannotBuild(f"there is no C++ compiler{f' {command[0]}' if command else ''}")
    try:
        run = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotBuild(f"the C++ compiler {command[0]} does not run ({error})") from error
    return command, run.stdout


def ensure(sources: Sequence[Path], flags: Sequence[str], version: str) -> Path:
    """The library built from `sources` (the first is compiled, the others are its headers); builds it if need be.

    version: of what it is built against. Raises CannotBuild: no compiler, an error of it, a cache that cannot be
    written.
    """
    command, compiler_version = compiler()
    digest = hashlib.sha256(repr((command, compiler_version, list(flags), version)).encode())
    for source in sources:
        digest.update(source.read_bytes())
    folder = cache_folder() / digest.hexdigest()[:20]
    if _is_whole(folder):
        return folder / LIBRARY
    try:
        with _locked(folder):
            if not _is_whole(folder):
                _build([*command, str(sources[0]), *flags], folder)
    except OSError as error:
        raise CannotBuild(f"the cache {cache_folder()} cannot be written ({error.strerror})") from error
    return folder / LIBRARY


def _is_whole(folder: Path) -> bool:
    try:
        return (folder / "sha256").read_text() == _sha256(folder / LIBRARY)
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:
        raise CannotBuild("only Linux on x86-64 is supported") from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(command: list[str], folder: Path) -> None:
    """Under the lock: clears what killed builds left, compiles beside `folder` and renames."""
    for left in (folder, *folder.parent.glob(f"{folder.name}-*")):
        shutil.rmtree(left, ignore_errors=True)
        if left.is_file():
            left.unlink()
    logger.info("building the native kernels, once, into %s", folder)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as name:
        made = Path(name) / "made"
        made.mkdir()
        run = subprocess.run([*command, "-o", str(made / LIBRARY)], capture_output=True, text=True)
        if run.returncode:
            errors = [line for line in run.stderr.splitlines() if "error" in line] or run.stderr.splitlines() or ["?"]
            raise CannotBuild(f"{command[0]} failed: {errors[0].strip()}")
        (made / "sha256").write_text(_sha256(made / LIBRARY))
        made.rename(folder)
    logger.info("built the native kernels in %.0f s", time.perf_counter() - start)
