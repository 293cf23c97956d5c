"""Which Linears read the same tensor in a forward, so that calibration keeps one entry of statistics for them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from viditq.quant.calibration.input_groups import InputGroups


class Readers:
    """inputs: Linear -> the inputs it has read, by number; layers that were not reached are absent."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[int]] = {}
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # by the id of an input
        self._count = 0

    @contextmanager
    def watching(self, denoiser: nn.Module, prefix: str = "") -> Iterator[None]:
        """Take note of what its Linears read; prefix: of their names."""
        linears = [(f"{prefix}{name}", m) for name, m in denoiser.named_modules() if isinstance(m, nn.Linear)]
        handles = [linear.register_forward_pre_hook(self._hook(name)) for name, linear in linears]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def read(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.inputs.setdefault(name, []).append(self._number(args[0]))

        return read

    def _number(self, x: Tensor) -> int:
        known = self._known.get(id(x))
        if known is None or known[0]() is not x:  # its id may be that of one that is gone
            known = self._known[id(x)] = weakref.ref(x), self._count
            self._count += 1
        return known[1]


def leaders(
    in_features: Mapping[str, int], inputs: Mapping[str, Sequence[int]], prefixes: Iterable[str] = ("",)
) -> dict[str, str]:
    """Linear -> the first in model order that has read what it has, or itself.

    in_features: of all Linears, in model order. prefixes: of the denoisers. Linears that were not reached share a
    blank entry by width, but for those of a denoiser of which nothing is known.
    """
    groups: dict[tuple[str, int | str], list[str]] = {}
    for prefix in prefixes:
        reached = any(name.startswith(prefix) for name in inputs)
        for name, width in in_features.items():
            if name.startswith(prefix):
                groups.setdefault((prefix, width if reached else name), []).append(name)
    parted = InputGroups(groups.values())
    parted.refine(inputs)
    leader_of = {layer: leader for leader, layers in parted.members.items() for layer in layers}
    return {name: leader_of[name] for name in in_features}


def leaders_among(layers: Iterable[str], leader_of: Mapping[str, str]) -> dict[str, str]:
    """The same for some of them: layer -> the first of these that reads what it does."""
    first: dict[str, str] = {}
    return {layer: first.setdefault(leader_of[layer], layer) for layer in layers}
