"""The build of the kernels, with a tiny source: no compiler, no cache, damage, two at once, killed ones."""

import ctypes
import logging
import multiprocessing
import os
import stat
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from viditq import kernels
from viditq.kernels import CannotBuild
from viditq.quant.execution.backends import Unavailable
from viditq.quant.execution.backends.native import build

FLAGS = ("-shared", "-fPIC")


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    try:
        kernels.compiler()
    except CannotBuild as reason:
        pytest.skip(str(reason))
    path = tmp_path / "answer.cpp"
    path.write_text('extern "C" int answer() { return 42; }\n')
    return path


def ensure(source: Path, version: str = "1") -> Path:
    return kernels.ensure([source], FLAGS, version)


def answer(path: Path) -> int:
    return ctypes.CDLL(str(path)).answer()


def counting_compiler(folder: Path, monkeypatch, before: str = "") -> Path:
    """A compiler that leaves a line per call in the returned file."""
    calls, script = folder / "calls", folder / "compiler"
    script.write_text(
        '#!/bin/sh\ncase "$*" in *--version*) echo fake 1; exit 0;; esac\n'
        f'echo call >> {calls}\n{before}\nexec c++ "$@"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))
    return calls


def test_built_once_and_told_so(source, caplog):
    with caplog.at_level(logging.INFO, "viditq"):
        path = ensure(source)
        assert answer(path) == 42
        assert [r.message.split(",")[0] for r in caplog.records][:1] == ["building the native kernels"]
        assert "built the native kernels in" in caplog.records[-1].message and len(caplog.records) == 2
        assert ensure(source) == path and len(caplog.records) == 2


def test_another_source_flag_torch_or_compiler_is_another_build(source, tmp_path, monkeypatch):
    paths = {ensure(source), ensure(source, "2"), kernels.ensure([source], (*FLAGS, "-O1"), "1")}
    source.write_text('extern "C" int answer() { return 43; }\n')
    paths.add(ensure(source))
    counting_compiler(tmp_path, monkeypatch)
    paths.add(ensure(source))
    assert len(paths) == 5
    assert [answer(path) for path in sorted(paths, key=os.path.getmtime)] == [42, 42, 42, 43, 43]


@pytest.mark.parametrize("compiler", ["", "no-such-compiler-anywhere"])
def test_no_compiler(source, monkeypatch, compiler):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(CannotBuild, match=f"no C\\+\\+ compiler.*{compiler}"):
        ensure(source)


def test_a_compiler_that_fails_or_does_not_know_a_flag(source, tmp_path, monkeypatch):
    with pytest.raises(CannotBuild, match=r"failed: .*no-such-flag"):
        kernels.ensure([source], (*FLAGS, "-mno-such-flag"), "1")
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(CannotBuild, match="does not run"):
        ensure(source)
    assert not list(kernels.cache_folder().glob("*-*")), "nothing is left behind"


def test_a_cache_that_cannot_be_written(source, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/self")
    with pytest.raises(CannotBuild, match="the cache /proc/self/viditq/native cannot be written"):
        ensure(source)


def test_a_cache_that_is_a_file(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CannotBuild, match="cannot be written"):
        ensure(source)


@pytest.mark.parametrize("damage", ["truncated", "empty", "altered", "no digest", "gone"])
def test_a_damaged_build_is_made_again(source, damage):
    path = ensure(source)
    whole = path.read_bytes()
    if damage == "no digest":
        (path.parent / "sha256").unlink()
    elif damage == "gone":
        path.unlink()
    else:
        path.unlink()  # never write into a file that is mapped
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "altered": whole[:-1] + b"!"}[damage])
    assert answer(ensure(source)) == 42


def test_what_a_killed_build_left_is_cleared(source):
    path = ensure(source)
    left = path.parent.with_name(f"{path.parent.name}-abc") / "made"
    left.mkdir(parents=True)
    (left / kernels.LIBRARY).write_bytes(b"half")
    path.unlink()
    assert answer(ensure(source)) == 42
    assert not left.parent.exists()


def builder(source: Path) -> BaseProcess:
    """A process that builds; a fork, which need not import torch again."""
    process = multiprocessing.get_context("fork").Process(target=ensure, args=(source,))
    process.start()
    return process


def test_two_processes_at_once_build_once(source, tmp_path, monkeypatch):
    calls = counting_compiler(tmp_path, monkeypatch, "sleep 0.3")
    for process in [builder(source), builder(source)]:
        process.join()
        assert process.exitcode == 0
    assert answer(ensure(source)) == 42
    assert calls.read_text().count("call") == 1


def test_a_killed_build_holds_up_nobody(source, tmp_path, monkeypatch):
    calls = counting_compiler(tmp_path, monkeypatch, f"while test -e {tmp_path}/hang; do sleep 0.02; done")
    (tmp_path / "hang").touch()
    process = builder(source)
    while not calls.exists():
        assert process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    (tmp_path / "hang").unlink()
    assert answer(ensure(source)) == 42
    assert calls.read_text().count("call") == 2


def test_a_cpu_without_the_instructions(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nflags : fpu sse2 avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_bf16\n")
    kernels.check_cpu(["avx512f", "avx512bf16", "fma"], cpuinfo)
    with pytest.raises(CannotBuild, match="this CPU has no avx512vnni"):
        kernels.check_cpu(build.INSTRUCTIONS, cpuinfo)
    cpuinfo.write_text("Features : asimd\n")
    with pytest.raises(CannotBuild, match="has no avx512f, "):
        kernels.check_cpu(build.INSTRUCTIONS, cpuinfo)
    with pytest.raises(CannotBuild, match="only Linux"):
        kernels.check_cpu(build.INSTRUCTIONS, tmp_path / "none")


def test_a_reason_is_found_once_and_told_every_time(monkeypatch):
    tries = []

    def fail(*_):
        tries.append(1)
        raise CannotBuild("because")

    monkeypatch.setattr(build, "_state", False)
    monkeypatch.setattr(kernels, "check_cpu", fail)
    for _ in range(2):
        with pytest.raises(Unavailable, match="backend native cannot run here: because"):
            build.load()
    assert len(tries) == 1


def test_a_build_that_does_not_load_is_made_once_more(monkeypatch, source):
    """A whole file, of a machine with other libraries."""
    loads = []

    def load(path):
        loads.append(path)
        if len(loads) == 1:
            raise OSError("GLIBC_2.99 not found")

    monkeypatch.setattr(torch.ops, "load_library", load)
    built = ensure(source)
    made = built.stat().st_mtime_ns
    plain = kernels.ensure
    monkeypatch.setattr(kernels, "ensure", lambda *_: plain([source], FLAGS, "1"))
    kernels.load([source], [])
    assert loads == [built, built] and built.stat().st_mtime_ns != made


def test_a_product_that_is_not_exact_is_not_used(monkeypatch):
    monkeypatch.setattr(kernels, "check_cpu", lambda _: None)
    monkeypatch.setattr(kernels, "load", lambda *_: None)
    monkeypatch.setattr(build, "_how", lambda: "")
    with pytest.raises(Unavailable, match="exactly"):
        build._load()
