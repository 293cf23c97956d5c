"""What needs a CUDA device: a real one, or that of simulated_cuda/ (test_simulated_gpu.py)."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from viditq.data.samples import load_sample
from viditq.engine.offload import offload_pipeline
from viditq.errors import UserError
from viditq.files import read_json
from viditq.loading import load_quantized

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
SIMULATED = torch.cuda.is_available() and torch.cuda.get_device_name() == "simulated"
ONE = "quant.segments=[0.0,1.0]"
UP_TO_SAMPLES = "[prompts,reference,calibrate,quantize,generate]"
LEARNED = ["quant=w4a8_naive", "quant/smoothing=none", ONE, "quant.rounding.iterations=4"]
LEARNED += ["quant.rounding.layer_iterations=4", "quant.rounding.tokens=16"]
METHODS = {
    "convrot": ["quant/smoothing=convrot", ONE],
    "scale_rotate": ["quant/smoothing=scale_rotate", ONE],
    "salience": ["quant/smoothing=salience", ONE],
    "gptq": ["quant/rounding=gptq"],
    "adaround": ["quant/rounding=adaround", "quant.rounding.iterations=4"],
    "block_adaround": [*LEARNED, "quant/rounding=block_adaround"],
    "block_adaround_lsq": [*LEARNED, "quant/rounding=block_adaround_lsq"],
    "grid_fit": ["quant/ranges=grid_fit"],
    "lp": ["quant=w4a8_naive", "quant/ranges=lp", "quant/ranges@quant.activation_ranges=lp"],
    "low_rank": ["quant.low_rank=4"],
    "ptqd": ["quant=w4a4", "quant/smoothing=none", ONE, "quant.correction=ptqd"],
    "sensitivity": ["quant/policy=sensitivity", "bits=w4a8"],
    "fp8": ["quant=w8a8_fp8"],
    "mxfp8": ["quant=w8a8_mxfp8"],
    "nvfp4": ["quant=w4a4_nvfp4"],
    "weights alone": ["quant=w4"],
    "attention": ["quant.attention=int8_qk_fp8_pv"],
    "text encoder": ["quant/text_encoder=w8"],
    "bfloat16": ["model.dtype=bfloat16"],
    "latents": ["noise_floor.latents=0.001"],
    "offloading": ["trainer.offload=sequential"],
    "benchmark": ["benchmark.max_seconds=null"],
}


@pytest.fixture(scope="session")
def gpu_run(run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a shrunk run on the GPU whose products are emulated, only to be read."""
    folder = tmp_path_factory.mktemp("gpu") / "run"
    run(folder, folder.parent / "cache", "trainer=gpu", "backend=fake")
    return folder


def samples(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "samples").iterdir() if file.suffix == ".png"}


@pytest.mark.gpu
@no_gpu
def test_a_run_on_a_gpu_agrees_with_the_cpu(gpu_run: Path, finished_run: Path, shared_cache: Path) -> None:
    """Of the metrics PSNR alone: with two prompts CLIPSIM moves by 8 where attention rounds otherwise."""
    cpu, gpu = (read_json(folder / "metrics.json")["metrics"] for folder in (finished_run, gpu_run))
    assert gpu["psnr"] == pytest.approx(cpu["psnr"], abs=3.0)
    floats = sorted((shared_cache / "reference").glob("*/*.png"))
    assert len(floats) == 6
    for file in floats:  # in float32, of another seed, in bfloat16
        there = load_sample(gpu_run.parent / "cache" / file.relative_to(shared_cache))
        assert (there.float() - load_sample(file).float()).abs().mean() < 2.0


@pytest.mark.gpu
@pytest.mark.skipif(SIMULATED, reason="the products of a whole run take minutes in triton's interpreter")
@no_gpu
def test_a_run_with_the_kernels_agrees_with_emulation(run: Callable[..., Any], gpu_run: Path, tmp_path: Path) -> None:
    metrics = run(tmp_path / "run", gpu_run.parent / "cache", "trainer=gpu")
    assert metrics is not None
    assert metrics["metrics"]["psnr"] == pytest.approx(read_json(gpu_run / "metrics.json")["metrics"]["psnr"], abs=3.0)


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("offload", [pytest.param("model", marks=pytest.mark.slow), "sequential"])
def test_offloading_moves_no_bit(run: Callable[..., Any], gpu_run: Path, tmp_path: Path, offload: str) -> None:
    overrides = ["trainer=gpu", "backend=fake", f"trainer.offload={offload}", f"stages={UP_TO_SAMPLES}"]
    run(tmp_path / "run", gpu_run.parent / "cache", *overrides)
    assert samples(tmp_path / "run") == samples(gpu_run)


@pytest.mark.slow
@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_on_a_gpu(run: Callable[..., Any], gpu_run: Path, tmp_path: Path, name: str) -> None:
    metrics = run(tmp_path / "run", gpu_run.parent / "cache", "trainer=gpu", "backend=fake", *METHODS[name])
    assert metrics is not None and math.isfinite(metrics["metrics"]["psnr"])


def left(pipeline: Any) -> None: ...


def moved(pipeline: Any) -> None:
    pipeline.to("cuda")


def cast(pipeline: Any) -> None:
    pipeline.to("cuda", torch.bfloat16)


def by_model(pipeline: Any) -> None:
    pipeline.enable_model_cpu_offload()


def by_layer(pipeline: Any) -> None:
    offload_pipeline(pipeline, "sequential", torch.device("cuda"))


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("move", [moved, cast, by_model, by_layer])
def test_a_pipeline_of_an_artifact_samples_on_a_gpu(gpu_run: Path, move: Callable[[Any], None]) -> None:
    there = sampled(gpu_run, move)
    assert (there - sampled(gpu_run, left)).abs().mean() < (0.02 if move is cast else 0.005)


@cache
def sampled(run: Path, move: Callable[[Any], None]) -> Tensor:
    pipeline = load_quantized(run, backend="portable")
    pipeline.set_progress_bar_config(disable=True)
    move(pipeline)
    noise = torch.Generator().manual_seed(0)
    return pipeline("a red circle", generator=noise, num_inference_steps=2, output_type="pt").images.float().cpu()


def linear(backend: str, device: str) -> Tensor:
    """What a quantized Linear that was made on the CPU gives on `device`."""
    from viditq.quant import QuantSpec, Recipe, linear_names, quantize_denoiser

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 32)), torch.randn(20, 32)
    recipe = Recipe(QuantSpec(8, True, "channel"), QuantSpec(8, False, "token", dynamic=True))
    quantize_denoiser(model, recipe.resolve(linear_names(model)), None, backend, 1000.0)
    with torch.no_grad():
        return model.to(device)(x.to(device)).cpu()


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "portable"])
def test_a_model_that_is_moved_to_a_gpu_computes_there(backend: str) -> None:
    assert (linear(backend, "cuda") - linear("fake", "cpu")).abs().max() < 1e-5


@pytest.mark.gpu
@no_gpu
def test_a_model_for_the_cpu_that_is_moved_to_a_gpu_is_refused() -> None:
    from viditq.quant import get_backend
    from viditq.quant.execution.backends.auto import why_unavailable

    if (reason := why_unavailable(get_backend("native"))) is not None:
        pytest.skip(reason)
    with pytest.raises(UserError, match=r'loaded for the CPU.*backend="cuda"'):
        linear("native", "cuda")


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
