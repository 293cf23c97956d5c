"""What stands around a product in a block and can be done in the same pass over memory.

Legend: [..., C] inputs, [..., O] outputs, M rows (the product of the leading axes), R lines: row m takes line
m // (M / R), so that R = 1 is for all rows and R = B one for each leading element.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("none", "gelu_tanh", "gelu", "silu")


class Before(NamedTuple):
    """layernorm(x) * mul + add; any part may lack.

    eps: of a LayerNorm over C without weight and bias (those are a mul and an add); None = no norm. mul, add: float32
    [R, C].
    """

    eps: float | None = None
    mul: Tensor | None = None
    add: Tensor | None = None

    @property
    def is_nothing(self) -> bool:
        return self.eps is None and self.mul is None and self.add is None

    def apply(self, x: Tensor) -> Tensor:
        """In plain torch, computed in float32 and rounded to the dtype of `x`."""
        if self.is_nothing:
            return x
        y = x.float()
        if self.eps is not None:
            y = F.layer_norm(y, y.shape[-1:], eps=self.eps)
        if self.mul is not None:
            y = y * _by_line(self.mul, y)
        if self.add is not None:
            y = y + _by_line(self.add, y)
        return y.to(x.dtype)


class After(NamedTuple):
    """residual + gate * activation(y); any part may lack. gate: float32 [R, O]. residual: [..., O].

    dtype: of the output, for whoever reads it in that one alone; None = the layer's.
    """

    activation: str = "none"
    gate: Tensor | None = None
    residual: Tensor | None = None
    dtype: torch.dtype | None = None

    @property
    def is_nothing(self) -> bool:
        """But for the dtype."""
        return self.activation == "none" and self.gate is None and self.residual is None

    def apply(self, y: Tensor) -> Tensor:
        """In plain torch, computed in the dtype of `y`."""
        if self.activation == "silu":
            y = F.silu(y)
        elif self.activation != "none":
            y = F.gelu(y, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        if self.gate is not None:
            y = (y.float() * _by_line(self.gate, y)).to(y.dtype)
        y = y if self.residual is None else self.residual + y
        return y if self.dtype is None else y.to(self.dtype)


NOTHING_BEFORE, NOTHING_AFTER = Before(), After()


def _by_line(lines_RC: Tensor, x: Tensor) -> Tensor:
    """[R, C] spread over the rows of `x`, in a shape that broadcasts with it."""
    rows = x[..., 0].numel()
    if len(lines_RC) == 1:
        return lines_RC.view(*(1,) * (x.ndim - 1), -1)
    if x.ndim > 1 and len(lines_RC) == len(x):
        return lines_RC.view(len(x), *(1,) * (x.ndim - 2), -1)
    return torch.repeat_interleave(lines_RC, rows // len(lines_RC), 0).view(x.shape)
