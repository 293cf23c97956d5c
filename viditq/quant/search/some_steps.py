"""The denoiser's output in a few steps of a float run, with a part of it quantized: how parts compare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from viditq.quant.calibration.context import denoisers_of
from viditq.quant.description.plan import QuantPlan
from viditq.quant.diagnosis.diagnosis import predicted
from viditq.quant.search.proxy import Call, copied
from viditq.quant.search.sensitivity import Swapper

TINY = torch.finfo(torch.float64).tiny


class SomeSteps:
    """Error of the output in `count` steps, evenly spread, of each denoiser. Use: `with steps.recording(): sample`."""

    def __init__(self, swapper: Swapper, count: int) -> None:
        self._swapper, self._count = swapper, count
        self._parts = denoisers_of(swapper.denoiser)
        self._calls: dict[str, list[Call]] = {}
        self._exact: dict[str, list[Tensor]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keeps the inputs of every step, and then of those that are taken."""
        calls: dict[str, list[tuple[float, Call]]] = {prefix: [] for prefix in self._parts}

        def keep(prefix: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            level = self._swapper.context.noise_level
            assert level is not None
            call = tuple(map(copied, args)), {key: copied(value) for key, value in kwargs.items()}
            calls[prefix].append((level, call))

        handles = [
            part.register_forward_pre_hook(partial(keep, prefix), with_kwargs=True)
            for prefix, part in self._parts.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        for prefix, made in calls.items():  # prompts of several lengths are sampled one group after the other
            ordered = [call for _, call in sorted(made, key=lambda one: -one[0])]
            count = min(self._count, len(ordered))
            self._calls[prefix] = [ordered[int((i + 0.5) * len(ordered) / count)] for i in range(count)]
            self._exact[prefix] = [self._output(prefix, call) for call in self._calls[prefix]]

    def error(self, plan: QuantPlan) -> float:
        """Mean over the steps of ||quantized - float||^2 / ||float||^2; plan: of Linears of one denoiser."""
        layer = next(iter(plan.layers))
        prefix = next(prefix for prefix in self._parts if layer.startswith(prefix))
        with self._swapper.swapped(plan):
            outputs = [self._output(prefix, call) for call in self._calls[prefix]]
        pairs = zip(outputs, self._exact[prefix], strict=True)
        errors = [float((o - e).square().sum() / e.square().sum().clamp(min=TINY)) for o, e in pairs]
        return sum(errors) / max(len(errors), 1)

    @torch.no_grad()
    def _output(self, prefix: str, call: Call) -> Tensor:
        args, kwargs = call
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        return predicted(self._parts[prefix](*args, **kwargs), inputs).double()
