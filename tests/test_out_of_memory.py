"""Where memory does not suffice the run ends with the estimate and with what needs less."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import viditq.estimate
from viditq.cli import guarded
from viditq.errors import UserError
from viditq.experiment import build
from viditq.job import Job
from viditq.out_of_memory import expected
from viditq.run_dir import RunDir


def test_a_gpu_that_is_too_small_ends_with_the_estimate_and_what_needs_less(
    tmp_path: Path, shrunk: list[str], configure: Callable[..., Any], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch raises it; the estimate is of the stage that met it."""
    from viditq import runner

    text = (
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 3 is free."
    )

    def meet(job: Any) -> str:
        raise torch.OutOfMemoryError(text)

    monkeypatch.setitem(runner.FUNCTIONS, "reference", meet)
    cfg = configure(*shrunk, f"cache_dir='{tmp_path / 'cache'}'", "batch_size=2", "stages=[prompts,reference]")
    assert guarded(cfg, lambda: runner.run(cfg, tmp_path / "run")) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told and "The memory of the GPU does not suffice. Tried to allocate 20.00 GiB." in told
    estimated = re.search(
        r"Estimated for reference .*: ([\d.]+) [MG]B as configured, ([\d.]+) [MG]B with batch_size=1\.", told
    )
    assert estimated and all(float(size) > 0 for size in estimated.groups()), told
    for words in ("trainer.offload=model", "model.width", "model.num_frames", "backend", "fit=84GB"):
        assert words in told


def test_what_a_gpu_needs_less_with_offloading_is_told(
    tmp_path: Path, shrunk: list[str], configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = build(configure(*shrunk, f"cache_dir='{tmp_path / 'cache'}'"))
    gpu = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cuda")), num_devices=1, num_nodes=1, world_size=1
    )
    job = Job(replace(experiment, make_trainer=lambda: gpu), RunDir(tmp_path / "run", experiment.tracked))
    line = expected(job, "generate")
    sizes = [float(found) for found in re.findall(r"([\d.]+) MB", line)]
    assert "with trainer.offload=model" in line and len(sizes) == 3 and sizes == sorted(sizes, reverse=True)
    assert expected(job, "report") == ""

    def refuse(*_: Any) -> None:
        raise UserError("its shapes cannot be followed")

    monkeypatch.setattr(viditq.estimate, "estimate", refuse)
    assert expected(job, "generate").startswith("What generate needs cannot be estimated: ")
