"""Stage `benchmark`: time and memory of a step of the denoiser, float and quantized side by side."""

import random
import time
from functools import partial
from typing import Any

import torch
from torch import nn

from viditq import provenance
from viditq.engine.capture import Call, first_call
from viditq.engine.sampling import batches_of
from viditq.engine.timing import MIN_ROUNDS, free_bytes, interleaved, peak_bytes, rounds_within, spread
from viditq.files import is_whole, write_json
from viditq.job import Job
from viditq.loading import in_dtype
from viditq.memory import give_back, reusing
from viditq.models.adapter import ModelAdapter
from viditq.models.compiling import compiled_twin
from viditq.models.dtypes import DTYPES
from viditq.models.generate import group_by_shape
from viditq.quant.sizes import held_bytes
from viditq.report.speed import milliseconds
from viditq.run_dir import Entry
from viditq.seconds import read_seconds
from viditq.stages.external import load_judged

WARM_UPS = 2  # of each candidate; in the second its memory is seen
HALF = "bfloat16"
FLOAT, QUANTIZED, COMPILED = "float", "quantized", "_compiled"


def benchmark(job: Job) -> str:
    """Measure on the first process; writes speed.json. Left out, with the reason, where it would take too long."""
    path = job.run_dir.speed
    if job.processes.first_does(lambda: is_whole(path)):
        return f"already done ({path})"
    if why := job.processes.first_does(lambda: why_not(job)):
        return f"left out: {why}"
    with job.timed(job.run_dir.path, "benchmark"):
        return job.processes.first_does(lambda: _benchmark(job))


def why_not(job: Job) -> str | None:
    """Why nothing is measured; None where it is."""
    e = job.experiment
    if e.offload is not None:
        return "with trainer.offload a step takes as long as its weights take to move"
    if e.quant.attention is not None:
        return f"quant.attention={e.quant.attention} is emulated, which says nothing of the time of a kernel"
    most, expected = e.benchmark_seconds, expected_seconds(job)
    if most is not None and expected is not None and expected > most:
        return (
            f"it would take about {expected:.0f} s by the time of a step in reference and generate, more than "
            f"benchmark.max_seconds={most:g}; benchmark.max_seconds=null measures however long it takes"
        )
    needed = weights_side_by_side(sum(p.numel() for p in e.adapter.build_denoiser().parameters()), e.adapter)
    free = free_bytes(e.device)
    if free is not None and needed > free:
        job.may_change()
        return f"float, {HALF} and quantized weights together take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} are free"
    return None


def weights_side_by_side(num_parameters: int, adapter: ModelAdapter) -> int:
    """Bytes of the denoiser's weights in float, in half and quantized; where fewer are free nothing is measured."""
    return num_parameters * (2 * adapter.torch_dtype.itemsize + DTYPES[HALF].itemsize + 1)  # codes, and float ones


def expected_seconds(job: Job) -> float | None:
    """What the fewest rounds take at most, by the stages that ran these steps; None where no such stage is recorded."""
    floors = {HALF: job.floors.get(HALF)} if job.experiment.adapter.dtype != HALF else {}
    stages: dict[str, tuple[Entry | None, int]] = {FLOAT: (job.reference, job.num_prompts)}
    stages |= {name: (entry, job.floor_size) for name, entry in floors.items()}
    known = {name: _step(job, entry.path, "reference", n) for name, (entry, n) in stages.items() if entry is not None}
    known[QUANTIZED] = _step(job, job.run_dir.path, "generate", job.num_prompts)
    steps = [seconds for seconds in known.values() if seconds is not None]
    if not steps:
        return None
    candidates = 2 + len(floors)
    return (WARM_UPS + MIN_ROUNDS) * (sum(steps) + (candidates - len(steps)) * max(steps))


def _step(job: Job, folder: Any, stage: str, num_prompts: int) -> float | None:
    """Seconds of a stage by the calls of the denoiser that it made: more than one takes, as it does other things."""
    seconds = read_seconds(folder).get(stage)
    if seconds is None:
        return None
    e = job.experiment
    load, batches = job.load_embeds(e.data.prompts), batches_of(num_prompts, e.batch_size)
    calls = len(batches) * len(group_by_shape(e.adapter, [load(i) for i in batches[0]])) * e.adapter.num_steps
    return seconds / calls


def _benchmark(job: Job) -> str:
    e, device = job.experiment, job.experiment.device
    call, denoisers, executed = _denoisers(job, device)
    give_back()  # the rest of the pipelines
    work = {name: partial(_computed, call, denoiser, device) for name, denoiser in denoisers.items()}
    steps, peaks = {}, {}
    with reusing():
        for name, step in work.items():
            for _ in range(WARM_UPS - 1):
                step()
            start = time.perf_counter()
            peaks[name] = peak_bytes(step, device)
            steps[name] = time.perf_counter() - start
        each, limit = sum(steps.values()), e.benchmark_seconds
        rounds = rounds_within(None if limit is None else limit - WARM_UPS * each, each, e.benchmark_rounds)
        seconds = interleaved(work, rounds, random.Random(e.seed))
    candidates = {
        name: {
            "dtype": _dtype(job, name),
            "compiled": name.endswith(COMPILED),
            "seconds": spread(seconds[name]),
            "weights_bytes": held_bytes(denoiser),
            "step_bytes": peaks[name],
        }
        for name, denoiser in denoisers.items()
    }
    speed = {
        "backend": executed,
        "batch_size": call.num_prompts,
        "rounds": rounds,
        "machine": provenance.compute(device),
        "candidates": candidates,
    }
    job.run_dir.forget_report()
    write_json(job.run_dir.speed, speed)
    told = ", ".join(f"{name} {milliseconds(spread(times)['median'])}" for name, times in seconds.items())
    return f"a step of {call.num_prompts} prompts: {told} ({job.run_dir.speed})"


def _computed(call: Call, denoiser: nn.Module, device: torch.device) -> None:
    call.on(denoiser)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _denoisers(job: Job, device: torch.device) -> tuple[Call, dict[str, nn.Module], dict[str, Any]]:
    """A call that the run's sampling loop makes, what is measured by it, on the device, and what executes it."""
    e = job.experiment
    adapter, batch = e.adapter, batches_of(job.num_prompts, e.batch_size)[0]
    pipeline = job.load_float()
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.to(device)
    embeds, ours = list(map(job.load_embeds(e.data.prompts), batch)), job.external is None
    call = first_call(adapter, pipeline, embeds, batch, e.seed, inference_mode=ours)
    found = {FLOAT: adapter.denoiser_of(pipeline)}
    if adapter.dtype != HALF:
        found[HALF] = adapter.denoiser_of(in_dtype(adapter, adapter.load(), HALF)).to(device)
    quantized, executed = load_judged(job, tell=False)
    found[QUANTIZED] = adapter.denoiser_of(quantized).to(device)
    if adapter.compile:
        found |= {f"{name}{COMPILED}": compiled_twin(denoiser) for name, denoiser in found.items()}
    return call, found, executed


def _dtype(job: Job, name: str) -> str:
    e = job.experiment
    of = {HALF: HALF, QUANTIZED: e.quant.float_dtype or e.adapter.dtype}
    return of.get(name.removesuffix(COMPILED), e.adapter.dtype)
