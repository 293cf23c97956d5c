"""A quantized denoiser of made-up codes: it takes the time and the memory of the real one, and no calibration."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from viditq.models.adapter import ModelAdapter
from viditq.quant.calibration.observers import Observer, blank_state
from viditq.quant.calibration.statistics import CalibrationStats
from viditq.quant.convert import quantize_denoiser
from viditq.quant.description.plan import QuantPlan
from viditq.quant.execution.linear import quant_linears
from viditq.quant.search.shared_codes import share_codes
from viditq.quant.sizes import laid_out

NUM_BUCKETS = 20  # enough that every segment has one


def made_up_quantized(
    adapter: ModelAdapter, plan: QuantPlan, kept: Mapping[str, Tensor], dtype: torch.dtype, backend: str
) -> nn.Module:
    """The quantized denoiser with codes 0 and scales 1; kept: the float denoiser's tensors that are not quantized.

    Raises UserError where the backend cannot run it, or not here.
    """
    quantized = laid_out(adapter.build_denoiser().to(dtype), plan, adapter.timestep_scale, backend)
    tensors = {name: kept[name] if name in kept else _made_up(t) for name, t in quantized.state_dict().items()}
    quantized.load_state_dict(tensors, assign=True)
    for layer in quant_linears(quantized).values():
        layer.prepare()
    return quantized.eval().requires_grad_(False)


def _made_up(tensor: Tensor) -> Tensor:
    make = torch.ones if tensor.is_floating_point() else torch.zeros
    return make(tensor.shape, dtype=tensor.dtype)


def seconds_to_quantize(denoiser: nn.Module, plan: QuantPlan) -> float | None:
    """Of all layers, from the time that the largest one takes; None for a rounding whose time is not in proportion."""
    if any(scheme.rounding.needs_moments for scheme in plan.schemes.values()):
        return None
    linears: dict[str, Any] = {name: denoiser.get_submodule(name) for name in plan.layers}
    numel = {name: linear.weight.numel() for name, linear in linears.items()}
    largest = max(numel, key=lambda name: numel[name])
    linear = linears[largest]
    alone = _Alone(linear)
    one = QuantPlan(plan.edges, plan.schemes, {"linear": plan.layers[largest]})
    stats = CalibrationStats({"linear": _made_up_observer(linear.in_features)})
    start = time.perf_counter()
    quantize_denoiser(alone, share_codes(alone, one, stats).plan, stats)
    return (time.perf_counter() - start) * sum(numel.values()) / numel[largest]


class _Alone(nn.Module):
    """A denoiser of a single Linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """As a denoiser is called."""
        out: Tensor = self.linear(x)
        return out


def _made_up_observer(in_features: int) -> Observer:
    observer = Observer(blank_state((), NUM_BUCKETS, in_features, 16, "cpu"))
    observer.minimum.fill_(-1.0)
    observer.maximum.fill_(1.0)
    observer.amax_sum.fill_(1.0)
    observer.count.fill_(1)
    for levels in (observer.lowest_level, observer.highest_level):
        levels.copy_((torch.arange(NUM_BUCKETS) + 0.5) / NUM_BUCKETS)
    observer.rows.normal_(generator=torch.Generator().manual_seed(0))
    observer.keys.zero_()
    return observer
