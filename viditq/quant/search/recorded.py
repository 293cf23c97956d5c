"""Calls of denoisers while a float run samples, kept to be made again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from viditq.quant.calibration.context import StepContext
from viditq.quant.diagnosis.arguments import Call, kept
from viditq.quant.diagnosis.diagnosis import predicts_nothing

Steps = dict[tuple[str, int], list[tuple[float, Call]]]
"""(prefix of a denoiser, segment) -> noise level and arguments of each of its calls."""


@contextmanager
def recorded(parts: Mapping[str, nn.Module], context: StepContext) -> Iterator[Steps]:
    """The calls that predict something, while it lasts. parts: prefix -> denoiser, whose context it is."""
    steps: Steps = {}
    begun: dict[nn.Module, tuple[tuple[str, int], tuple[float, Call]]] = {}

    def begin(prefix: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert context.segment is not None and context.noise_level is not None
        begun[module] = ((prefix, context.segment), (context.noise_level, kept(args, kwargs)))

    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        step, call = begun.pop(module)
        if not predicts_nothing(output):
            steps.setdefault(step, []).append(call)

    hooks = [part.register_forward_hook(end) for part in parts.values()]
    hooks += [part.register_forward_pre_hook(partial(begin, name), with_kwargs=True) for name, part in parts.items()]
    try:
        yield steps
    finally:
        for hook in hooks:
            hook.remove()
