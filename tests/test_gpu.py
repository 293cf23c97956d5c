"""What needs a CUDA device."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")


@pytest.mark.gpu
@no_gpu
def test_a_run_on_a_gpu_agrees_with_the_cpu(
    run: Callable[..., dict[str, Any] | None], finished_run: Path, tmp_path: Path
) -> None:
    from viditq.files import read_json

    metrics = run(tmp_path / "run", tmp_path / "cache", "trainer=gpu")
    cpu = read_json(finished_run / "metrics.json")["metrics"]
    assert metrics is not None
    assert metrics["metrics"]["psnr"] == pytest.approx(cpu["psnr"], abs=3.0)
    assert metrics["metrics"]["clipsim"] == pytest.approx(cpu["clipsim"], abs=1.0)
