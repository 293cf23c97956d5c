"""Where learning a block starts: each of its weights rounded by itself, on second moments of the block's kept inputs.

Legend: C in_features, n rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from viditq.quant.methods.rounding.adaround import SHIFT, STRETCH, learned, row_errors, soft_inverse
from viditq.quant.numerics.size import power_of_two
from viditq.quant.reconstruction.soft import SoftWeight

LEARNING_RATE = 0.1
MARGIN = 0.03  # at 0 and 1 themselves no gradient goes through h


@contextmanager
def observed(linears: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Second moments X^T X [C, C] of what these Linears read inside; those that read the same tensor share one."""
    sums: dict[str, Tensor] = {}
    latest: tuple[Tensor, Tensor] | None = None  # the last input and its moments; no more, inputs are large

    def hook(name: str) -> object:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal latest
            if latest is None or latest[0] is not args[0]:
                rows_nC = args[0].flatten(0, -2)
                latest = (args[0], rows_nC.T @ rows_nC)
            sums[name] = sums[name] + latest[1] if name in sums else latest[1]

        return add

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]  # type: ignore[arg-type]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def round_alone(weight: SoftWeight, moments_CC: Tensor, iterations: int, strength: float) -> None:
    """Moves `soft` to where AdaRound of the weight by itself leads, a little back from the ends."""
    size = power_of_two(weight.exact.abs().amax())
    exact, scale = weight.exact / size, weight.scale / size
    error_O = row_errors(exact - weight.nearest / size, moments_CC)
    if not error_O.sum() > 0:
        return
    weighed_CC = moments_CC * (weight.exact.numel() / error_O.sum())
    how = (weight.limits, iterations, LEARNING_RATE, strength)
    h = (STRETCH * learned(exact, scale, weight.zero, weighed_CC, *how).sigmoid() - SHIFT).clamp_(0, 1)
    weight.soft.copy_(soft_inverse(h, MARGIN))
