"""A few steps of a float run on prompts that calibration has not seen: inputs of Linears, and the denoiser's output.

Errors there are honest: roundings that learn (GPTQ) fit the very inputs that were observed, text above all, of which a
few captions show little. Legend: n rows, C in_features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from viditq.quant.calibration.context import denoisers_of
from viditq.quant.description.plan import QuantPlan
from viditq.quant.diagnosis.arguments import Call, unshared
from viditq.quant.diagnosis.diagnosis import predicted
from viditq.quant.search.recorded import recorded
from viditq.quant.search.sensitivity import Swapper

TINY = torch.finfo(torch.float64).tiny
ROWS = 64  # inputs of a Linear kept from each step


class Step(NamedTuple):
    """One call of a denoiser, and its output in float."""

    prefix: str
    segment: int
    call: Call
    exact: Tensor


class SomeSteps:
    """`count` steps of each denoiser, spread over segments, one of each at least. layers: whose inputs are kept.

    Use: `with steps.recording(): sample`, then `rows` and `error`.
    """

    def __init__(self, swapper: Swapper, count: int, layers: Sequence[str]) -> None:
        self._swapper, self._count = swapper, count
        self._parts = denoisers_of(swapper.denoiser)
        self._linears = {layer: swapper.denoiser.get_submodule(layer) for layer in layers}
        self._steps: list[Step] = []
        self._rows: dict[str, dict[int, list[Tensor]]] = {layer: {} for layer in layers}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keeps the inputs of every step while it lasts, and then of those that are taken."""
        with recorded(self._parts, self._swapper.context) as calls:
            yield
        for (prefix, segment), made in calls.items():
            ordered = [call for _, call in sorted(made, key=lambda one: -one[0])]
            segments = len({of for name, of in calls if name == prefix})
            count = min(-(-self._count // segments), len(ordered))
            for i in range(count):
                call = ordered[int((i + 0.5) * len(ordered) / count)]
                self._steps.append(Step(prefix, segment, call, self._observed(prefix, segment, call)))

    def rows(self, layer: str) -> dict[int, Tensor]:
        """Segment -> inputs [n, C] of a Linear, of those segments that it was seen in."""
        return {segment: torch.cat(rows) for segment, rows in self._rows[layer].items()}

    def error(self, plan: QuantPlan) -> float:
        """Mean over the steps of ||quantized - float||^2 / ||float||^2; plan: of Linears of one denoiser."""
        layer, errors = next(iter(plan.layers)), []
        with self._swapper.swapped(plan):
            for step in (step for step in self._steps if layer.startswith(step.prefix)):
                error = self._output(step.prefix, step.call) - step.exact
                errors.append(float(error.square().sum() / step.exact.square().sum().clamp(min=TINY)))
        return sum(errors) / max(len(errors), 1)

    def _observed(self, prefix: str, segment: int, call: Call) -> Tensor:
        """The float output; inputs of Linears are kept beside it."""

        def keep(layer: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows_nC = args[0].detach().flatten(0, -2)
            chosen = torch.randperm(len(rows_nC), generator=torch.Generator().manual_seed(0))[:ROWS]
            self._rows[layer].setdefault(segment, []).append(rows_nC[chosen.to(rows_nC.device)].clone())

        hooks = [m.register_forward_pre_hook(partial(keep, layer)) for layer, m in self._linears.items()]
        try:
            return self._output(prefix, call)
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _output(self, prefix: str, call: Call) -> Tensor:
        args, kwargs = unshared(*call)
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        return predicted(self._parts[prefix](*args, **kwargs), inputs).double()
