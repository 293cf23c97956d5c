"""Which layers of a loaded artifact are in memory, under a budget: the others are made from its files when called.

A sampler calls the layers of a denoiser in turn, again and again. What was used longest ago is then what is needed
next, so that letting go of it would make everything anew at each step: layers that were there first stay, as many as
fit, and the rest come one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.mapped import release
from viditq.on_disk import leave_on_disk, made_real

Call = tuple[Any, int]  # a QuantLinear, and which of its variants


class Residency:
    """Bytes for weights, shared by all layers of one denoiser. Raises UserError where not even one of them fits."""

    def __init__(self, budget: int, check: Callable[[Iterable[str]], None]) -> None:
        """budget: 0 = none of them stays. check: is told the names of tensors that are about to be read."""
        self.budget, self._check = budget, check
        self._room = 0  # for those that stay
        self._at_home: dict[Any, dict[str, Tensor | None]] = {}  # buffers as they were mapped, of those made real
        self._staying: dict[Any, int] = {}
        self._passing: list[Any] = []
        self._runs: Mapping[str, torch.dtype] = {}

    def attach(self, denoiser: nn.Module, layers: Mapping[str, Any], runs: Mapping[str, torch.dtype]) -> None:
        """Take charge of a denoiser whose tensors are mapped.

        layers: its QuantLinears by name. runs: types of tensors that compute in another than they are stored in.
        """
        self._runs = runs
        small, passing = leave_on_disk(denoiser, runs, self._check, skip=layers.values(), hide=not self.budget)
        for name, layer in layers.items():
            layer.residency, layer.stored_name = self, name
            if layer.bias is not None:
                layer.bias = made_real(layer.bias, runs.get(f"{name}.bias", layer.bias.dtype))
                small += layer.bias.nbytes
        largest = {name: largest_bytes(layer) for name, layer in layers.items()}
        if largest:  # what comes is made while what goes is still there
            passing = max(passing, 2 * max(largest.values()))
        self._room = max(self.budget - small - passing, 0)
        if 0 < self.budget < small + passing:
            raise UserError(
                f"memory_budget={self.budget} is too little for this model: what is always in memory takes {small} "
                f"bytes, and what computes up to {passing}. Give at least {small + passing}."
            )

    def use(self, calls: Sequence[Call]) -> None:
        """Make these layers' variants ready to multiply, all at once."""
        wanted = [layer.variants[index] for layer, index in calls]
        if all(variant in self._at_home for variant in wanted):
            return
        for variant in [v for v in self._passing if v not in wanted]:
            self._leave(variant)
        for (layer, index), variant in zip(calls, wanted, strict=True):
            if variant not in self._at_home:
                self._enter(layer, index, variant)

    def _enter(self, layer: Any, index: int, variant: Any) -> None:
        for other in layer.variants:  # of a segment that is over
            if other is not variant and other in self._staying:
                self._leave(other)
        prefix = f"{layer.stored_name}.variants.{index}."
        names = [f"{prefix}{name}" for name in variant.state_dict(keep_vars=True)]
        self._check(names)
        self._at_home[variant] = dict(variant._buffers)
        for key, buffer in variant._buffers.items():
            if buffer is not None and f"{prefix}{key}" in self._runs:
                variant._buffers[key] = buffer.to(self._runs[f"{prefix}{key}"])
        layer.backends[index].prepare(variant)
        release(buffer for buffer in self._at_home[variant].values() if buffer is not None)
        taken = _taken(variant)
        if sum(self._staying.values()) + taken <= self._room:
            self._staying[variant] = taken
        else:
            self._passing.append(variant)

    def _leave(self, variant: Any) -> None:
        buffers = self._at_home.pop(variant)
        variant.held = None
        variant.derived.clear()
        variant._buffers.clear()
        variant._buffers.update(buffers)
        release(buffer for buffer in buffers.values() if buffer is not None)
        self._staying.pop(variant, None)
        if variant in self._passing:
            self._passing.remove(variant)


def _taken(variant: Any) -> int:
    tensors: list[Any] = [*variant.held_tensors(), *(b for b in variant._buffers.values() if b is not None)]
    return sum(tensor.nbytes for tensor in tensors)


def largest_bytes(layer: Any) -> int:
    """Bytes of the variant that takes most once it is prepared."""
    shape = (layer.out_features, layer.in_features)
    pairs = zip(layer.backends, layer.variants, strict=True)
    return max(int(backend.weight_bytes(variant.scheme, *shape, layer.dtype)) for backend, variant in pairs)
