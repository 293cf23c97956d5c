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


@pytest.mark.gpu
@no_gpu
def test_samples_leave_a_gpu_as_they_are() -> None:
    from viditq.engine.writing import SampleWriter

    made = {
        i: (torch.randint(0, 256, (4, 3, 128, 128), dtype=torch.uint8), torch.full((2, 4000), i, dtype=torch.int16))
        for i in range(12)
    }
    seen: dict[int, list[torch.Tensor]] = {}
    with SampleWriter(lambda i, *sample: seen.setdefault(i, [one.clone() for one in sample]), 3) as writer:
        for i, sample in made.items():
            on_gpu = [one.cuda() for one in sample]  # a clip and its sound
            writer.put(i, *on_gpu)
            del on_gpu  # what is made next gets its memory, unless that is still being read
            torch.zeros_like(sample[0], device="cuda")
    pairs = [pair for i, sample in made.items() for pair in zip(seen[i], sample, strict=True)]
    assert all(torch.equal(found, wanted) and not found.is_cuda for found, wanted in pairs)


@pytest.mark.gpu
@no_gpu
def test_scales_on_a_gpu_are_those_of_a_cpu() -> None:
    """Divided truly; by the reciprocal, as torch divides by a number there, some of them would be an ulp off."""
    from viditq.quant import QuantSpec
    from viditq.quant.methods.quantizer import range_grid

    high = torch.rand(4096, 1) + 1e-3
    specs = [QuantSpec(8), QuantSpec(8, True), QuantSpec(4), *(QuantSpec(8, True, number=n) for n in ("e4m3", "e5m2"))]
    for spec in specs:
        there = range_grid(-0.5 * high.cuda(), high.cuda(), spec)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(there, range_grid(-0.5 * high, high, spec), strict=True))
