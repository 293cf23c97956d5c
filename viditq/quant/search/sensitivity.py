"""Sensitivity: one part of a denoiser quantized in place, everything else in float."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from viditq.quant.calibration.context import StepContext, TimestepScaleLike, denoisers_of
from viditq.quant.calibration.segment_sources import segment_sources
from viditq.quant.calibration.statistics import CalibrationStats
from viditq.quant.convert import fit_variant, quant_linear
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.execution.backends import get_backend
from viditq.quant.execution.linear import QuantLinear
from viditq.quant.execution.variant import Variant

Forward = Callable[..., Any]


class Swapper:
    """Quantizes Linears of a float denoiser for a while: `with swapper.swapped(plan): sample`; nothing is reloaded.

    All plans must have the same edges. stats: needed where a plan needs them. The StepContext stays attached until
    `close`.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        edges: Sequence[float],
        stats: CalibrationStats | None,
        timestep_scale: TimestepScaleLike = 1000.0,
        backend: str = "fake",
    ) -> None:
        self.denoiser, self.stats, self.backend = denoiser, stats, get_backend(backend)
        self.context = StepContext(edges, timestep_scale)
        self._attachment = self.context.attach(denoiser)

    def close(self) -> None:
        """Detaches from the denoiser."""
        self._attachment.remove()

    @contextmanager
    def swapped(self, plan: QuantPlan) -> Iterator[None]:
        """The denoiser quantized by `plan` inside the block, and its very own Linears in place again after it."""
        assert plan.edges == self.context.edges
        linears = {name: self.denoiser.get_submodule(name) for name in plan.layers}
        new: dict[nn.Module, QuantLinear] = {}
        segments = segment_sources(self.denoiser, plan, self.stats)
        for name, linear in linears.items():
            assert isinstance(linear, nn.Linear)
            new[linear] = self._quantized(name, linear, plan, segments[name])
        places = [
            (parent, key, child)
            for parent in self.denoiser.modules()
            for key, child in parent._modules.items()  # a shared Linear hangs from several places
            if child in new
        ]
        try:
            for parent, key, child in places:
                assert child is not None
                setattr(parent, key, new[child])
            yield
        finally:
            for parent, key, child in places:
                setattr(parent, key, child)

    def _quantized(self, name: str, linear: nn.Linear, plan: QuantPlan, segments: Sequence[int]) -> QuantLinear:
        def fit(linear: nn.Linear, scheme: LayerScheme, lo: float, hi: float) -> Variant:
            segment = segments[plan.edges.index(lo)]
            return fit_variant(name, linear, scheme, self.stats, plan.edges[segment], plan.edges[segment + 1])

        quantized = quant_linear(name, linear, plan, fit, self.context, self.backend)
        quantized.prepare()
        return quantized.to(linear.weight.device)


class Replay:
    """Skips what a candidate cannot have changed: above its segment the denoiser's output is float's, as recorded.

    Use: `with replay.recording()` around float runs, then `with replay.skipping(level)` around the same runs with the
    candidate in place. An output is found again by the very input that it belongs to: noise level, and the sum of each
    tensor (guidance can call the denoiser with the same latents and another prompt). Where that is not found, it is
    computed. Outputs stay in memory, one per call.
    """

    def __init__(self, denoiser: nn.Module, context: StepContext) -> None:
        self._denoiser, self._context = denoiser, context
        self._outputs: dict[tuple[Any, ...], Any] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keeps every output."""
        with self._patched(self._record):
            yield

    @contextmanager
    def skipping(self, level: float) -> Iterator[None]:
        """Computes at noise levels up to `level` only, the upper edge of the candidate's segment."""

        def replay(part: str, forward: Forward, *args: Any, **kwargs: Any) -> Any:
            noise_level = self._context.noise_level
            known = None
            if noise_level is not None and noise_level > level:
                known = self._outputs.get(self._key(part, args, kwargs))
            return forward(*args, **kwargs) if known is None else known

        with self._patched(replay):
            yield

    def _record(self, part: str, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        self._outputs[self._key(part, args, kwargs)] = output
        return output

    def _key(self, part: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        assert self._context.noise_level is not None
        sums = [float(t.detach().sum(dtype=torch.float64)) for t in _real_tensors([*args, *kwargs.values()])]
        return part, self._context.noise_level, *sums

    @contextmanager
    def _patched(self, wrapper: Forward) -> Iterator[None]:
        parts = denoisers_of(self._denoiser)
        for name, part in parts.items():
            part.forward = functools.partial(wrapper, name, part.forward)
        try:
            yield
        finally:
            for part in parts.values():
                del part.forward  # uncovers the class's own


def _real_tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and mappings but complex ones (tables of rotary positions)."""
    if isinstance(value, Tensor):
        if not value.is_complex():
            yield value
    elif isinstance(value, Mapping):
        yield from _real_tensors([*value.values()])
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _real_tensors(part)
