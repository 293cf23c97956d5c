"""What stands behind a product, whatever computes it, and how much further from the exact result it may bring one.

Legend: M rows, O out_features.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from viditq.quant.execution.surroundings import ACTIVATIONS, After

STEEPEST = 1.13  # slope of a GELU, which enlarges an error that much


class Behind(Protocol):
    """residual + gate * activation(product + addend) in `dtype`; parts as in `ops.arguments`."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def addend(self) -> Tensor | None: ...
    @property
    def activation(self) -> int: ...
    @property
    def gate(self) -> Tensor | None: ...
    @property
    def residual(self) -> Tensor | None: ...


def finished(behind: Behind, y_MO: Tensor) -> Tensor:
    """What stands behind the product, on its result with scales and bias."""
    y_MO = y_MO if behind.addend is None else y_MO + behind.addend
    return After(ACTIVATIONS[behind.activation], behind.gate, behind.residual).apply(y_MO).to(behind.dtype)


def allowed(behind: Behind, y_MO: Tensor, out_MO: Tensor, error_MO: Tensor) -> Tensor:
    """How far an output may lie from the exact `out_MO`, where its product may lie `error_MO` from `y_MO`."""
    gate = 1.0 if behind.gate is None else spread(behind.gate, len(y_MO)).double().abs()
    beside = 0.0 if behind.residual is None else behind.residual.double().abs()
    if behind.addend is not None:
        y_MO = y_MO.abs() + behind.addend.double().abs()
    of = torch.finfo(behind.dtype)  # a library rounds the product, what an activation makes of it, and the end
    bound = STEEPEST * gate * (error_MO + of.eps * y_MO.abs()) + 2 * of.eps * (out_MO.abs() + beside)
    return bound + torch.finfo(torch.float32).smallest_normal + of.smallest_normal * of.eps


def spread(gate: Tensor, rows: int) -> Tensor:
    """[lines, O] -> [M, O]."""
    return gate.repeat_interleave(rows // len(gate), 0)
