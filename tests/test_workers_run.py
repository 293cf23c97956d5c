"""Runs whose samples several processes make side by side: equal to the byte, and told as one."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from viditq.engine.sampling import Generation
from viditq.errors import UserError
from viditq.fusion.block import FusedBlock
from viditq.seconds import read_conditions
from viditq.stages import samples

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
Run = Callable[..., Any]


@pytest.fixture
def side_by_side(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, bool]]]:
    """torch with two threads, and the loops that have workers: how many, and whether they run fused blocks."""
    loops: list[tuple[int, bool]] = []
    before = samples.run_side_by_side

    def seen(trainer: Any, module: Generation, batches: Any, workers: int) -> None:
        denoiser = module.adapter.denoiser_of(module.pipeline)
        make = module.make

        def made(indices: list[int]) -> Any:
            fused = [part for part in denoiser.modules() if isinstance(part, FusedBlock)]
            assert all(part.fusion.checked or part.fusion.off for part in fused), "each worker would check, and tell"
            return make(indices)

        module.make = made  # type: ignore[method-assign]
        loops.append((workers, any(isinstance(part, FusedBlock) for part in denoiser.modules())))
        before(trainer, module, batches, workers)

    monkeypatch.setattr(samples, "run_side_by_side", seen)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield loops
    torch.set_num_threads(threads)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_samples_are_equal_to_the_byte(
    run: Run, side_by_side: list[tuple[int, bool]], finished_run: Path, shared_cache: Path, tmp_path: Path
) -> None:
    run(tmp_path / "run", tmp_path / "cache")
    assert side_by_side == [(2, False)] * 3 + [(2, True)]  # reference, two floors, generate
    assert files(tmp_path / "run") == files(finished_run)
    said = [read_conditions(folder) for folder in (tmp_path / "run", *(tmp_path / "cache" / "reference").iterdir())]
    made = [on for stages in said for stage, (on,) in stages.items() if stage in ("reference", "generate")]
    assert len(made) == 4 and all(on.startswith("2 processes of 1 thread of ") for on in made)
    assert said[0]["evaluate"][0].startswith("2 threads of ")
    mine, others = files(tmp_path / "cache" / "reference"), files(shared_cache / "reference")
    assert len(mine) == 6 and mine.items() <= others.items()


def test_without_workers_there_are_none(
    run: Run, side_by_side: list[tuple[int, bool]], shared_cache: Path, tmp_path: Path
) -> None:
    run(tmp_path / "run", shared_cache, "trainer.workers=0", "stages=[prompts,reference,calibrate,quantize,generate]")
    assert side_by_side == []


def test_a_worker_that_is_killed_ends_the_run_with_words(
    run: Run,
    side_by_side: list[tuple[int, bool]],
    shared_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make, here = Generation.make, os.getpid()

    def made(self: Generation, indices: list[int]) -> Any:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return make(self, indices)

    monkeypatch.setattr(Generation, "make", made)
    with pytest.raises(UserError, match=r"was ended from outside .* trainer\.workers=0"):
        run(tmp_path / "run", shared_cache, "seed=5", "stages=[prompts,reference]")
