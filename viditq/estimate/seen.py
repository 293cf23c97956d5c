"""What an estimate finds out by running: the float and the quantized model, each once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from viditq.engine.offload import offload_pipeline
from viditq.estimate.backends import Held, refusals
from viditq.estimate.mock import made_up_quantized, seconds_to_quantize
from viditq.estimate.probe import Probe, probe
from viditq.job import Job
from viditq.memory import give_back
from viditq.models.generate import DtypeBoundary
from viditq.models.text import PromptEmbeds
from viditq.quant.description.plan import QuantPlan
from viditq.quant.execution.backends import Unavailable, get_backend


@dataclass(frozen=True)
class Seen:
    """What was found by running."""

    float_model: Probe
    quantized: Probe | None = None
    load_seconds: float = 0.0
    quantize_seconds: float | None = None
    backends: Mapping[str, Held] = field(default_factory=dict)


def measured(job: Job, trainer: Any, embeds: PromptEmbeds, batch: int, dtype: torch.dtype) -> Seen:
    """Of the loaded float model, then of a quantized one of made-up codes, in `dtype`, by every backend."""
    e, plan, device = job.experiment, plan_of(job), trainer.strategy.root_device
    synchronize: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def probed(pipeline: Any) -> Probe:
        _place(pipeline, trainer)
        return probe(e.adapter, pipeline, embeds, batch, synchronize)

    start = time.perf_counter()
    pipeline = e.adapter.load()
    loading = time.perf_counter() - start
    denoiser = e.adapter.denoiser_of(pipeline)
    seconds = seconds_to_quantize(denoiser, plan) if plan.layers else None
    float_model = probed(pipeline)
    if not plan.layers:
        return Seen(float_model, None, loading, seconds)
    quantized_weights = {f"{name}.weight" for name in plan.layers}
    kept = {n: t.to("cpu", dtype) for n, t in denoiser.state_dict().items() if n not in quantized_weights}
    del pipeline, denoiser  # the two need not fit side by side
    give_back()

    def quantized_probe(backend: str) -> Probe:
        get_backend(backend).check_available()
        quantized = made_up_quantized(e.adapter, plan, kept, dtype, backend)
        if e.quant.float_dtype not in (None, e.adapter.dtype):
            DtypeBoundary(quantized, dtype, e.adapter.torch_dtype, e.adapter.timestep_argument)
        return probed(e.adapter.load(quantized))

    mine = quantized_probe(e.backend)
    backends = refusals(plan)
    for name in [name for name, one in backends.items() if not one.why]:
        try:
            seen = mine if name == e.backend else quantized_probe(name)
            backends[name] = Held(0, seen.forward_seconds)
        except Unavailable as error:
            backends[name] = Held(0, why=error.reason)
    return Seen(float_model, mine, loading, seconds, backends)


def plan_of(job: Job) -> QuantPlan:
    """The plan of the run; while it has yet to be searched, the one that the search starts from."""
    return job.plan if not job.searches or job.run_dir.plan.is_file() else job.experiment.plan


def _place(pipeline: Any, trainer: Any) -> None:
    offload, device = getattr(trainer, "offload", None), trainer.strategy.root_device
    if offload is not None:
        offload_pipeline(pipeline, offload, device)
    else:
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.to(device)
