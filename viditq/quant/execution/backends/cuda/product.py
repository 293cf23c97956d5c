"""A product of rows in codes with a weight in codes, and what stands behind it, apart from how it is computed.

Legend: M rows, O out_features, S segments of the in-features, g of them a segment, R ranges of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from viditq.quant.execution.backends.cuda.behind import allowed, finished
from viditq.quant.execution.backends.signed import SignedWeight
from viditq.quant.execution.backends.triton.ops import Quantized

RELATIVE = 2.0**-20  # of the sum of |x w|: what rounding of scales and of sums over segments may cost
PROBED_ROWS, PROBED_OUTS = 64, 256


class Product(NamedTuple):
    """residual + gate * activation(Q(x) Q(w)^T + bias + addend) as [M, O] in `dtype`; parts as in `ops`."""

    x: Quantized
    weight: SignedWeight
    bias: Tensor | None
    dtype: torch.dtype
    addend: Tensor | None = None
    activation: int = 0
    gate: Tensor | None = None
    residual: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """M, in-features, O."""
        return self.x.codes.shape[1], self.weight.in_features, self.weight.scale.shape[1]

    @property
    def kind(self) -> tuple[object, ...]:
        """What decides how fast it is computed, but for what stands behind it."""
        return (*self.shape, *self.x.codes.shape, self.x.scale.shape[1], self.x.symmetric, self.weight.packed,
                self.weight.zero_point is None, self.dtype, str(self.x.codes.device))  # fmt: skip

    @property
    def device(self) -> torch.device:
        """Where its tensors lie."""
        return self.x.codes.device

    @property
    def label(self) -> str:
        """Of its weight: W4 where two codes lie in a byte."""
        return "W4" if self.weight.packed else "W8"

    @property
    def is_plain(self) -> bool:
        """One segment, a byte a weight, no zero points: a scale for each row and one for each output say it all."""
        return len(self.weight.scale) == 1 and not self.weight.packed and self.is_symmetric

    @property
    def is_symmetric(self) -> bool:
        return self.x.symmetric and self.weight.zero_point is None

    def finished(self, y_MO: Tensor) -> Tensor:
        """What stands behind the product, on its result with scales and bias."""
        return finished(self, y_MO)

    def exact(self) -> tuple[Tensor, Tensor]:
        """The output in float64, and how far a right one may lie from it."""
        rows, weight = decoded_rows(self.x, self.weight.size), decoded_weight(self.weight)
        y, size = (rows @ weight.mT).sum(0), (rows.abs() @ weight.abs().mT).sum(0)
        if self.bias is not None:
            y, size = y + self.bias.double(), size + self.bias.double().abs()
        out = self._replace(dtype=torch.float64).finished(y)
        return out, allowed(self, y, out, RELATIVE * size)

    def corner(self) -> Product:
        """The same of a few outputs of a few rows, which share a line of the gate."""
        lines = 1 if self.gate is None else len(self.gate)
        rows, outs = min(PROBED_ROWS, self.shape[0] // lines), min(PROBED_OUTS, self.shape[2])
        scale, zero, rowsum = (part[:rows] for part in (self.x.scale, self.x.zero, self.x.rowsum))

        def cut(part: Tensor | None, count: int = rows) -> Tensor | None:
            return None if part is None else part[:count, :outs]

        return Product(
            Quantized(self.x.codes[:, :rows], scale, zero, rowsum, self.x.symmetric),
            self.weight.first(outs),
            None if self.bias is None else self.bias[:outs],
            self.dtype,
            cut(self.addend),
            self.activation,
            cut(self.gate, 1),
            cut(self.residual),
        )

    def extreme(self) -> Product:
        """A small one of this kind with the largest codes there are: what saturates or overflows shows here."""
        x, weight, rows, outs = self.x, self.weight, PROBED_ROWS, min(self.shape[2], PROBED_OUTS)
        codes = torch.full_like(x.codes[:, :1], 127).repeat(1, rows, 1)
        codes[:, ::2], codes[..., weight.size :] = -127 if x.symmetric else -128, 0
        scale = torch.full_like(x.scale[:1], 0.5).repeat(rows, 1)
        zero = torch.full_like(scale, 0 if x.symmetric else 77, dtype=torch.int32)
        lowest, highest = (0, 255) if weight.packed else (-128, 127)
        cut = weight.first(outs)
        data, quarters = torch.full_like(cut.data, highest), torch.full_like(cut.scale, 0.25)
        data[:, ::3] = lowest
        cut = cut._replace(data=data, scale=quarters)
        sums = decoded_weight(cut._replace(zero_point=None)).sum(-1) / cut.scale
        sums_of_rows = codes.sum(-1, dtype=torch.int32).T.contiguous()
        dtype = self.dtype if self.is_plain else torch.float32
        return Product(
            Quantized(codes, scale, zero, sums_of_rows, x.symmetric),
            cut._replace(colsum=sums.to(weight.colsum.dtype)),
            None,
            dtype,
        )


def decoded_weight(weight: SignedWeight) -> Tensor:
    """float64 [S, O, g]."""
    data = torch.stack((weight.data & 15, weight.data >> 4), -1).flatten(-2) if weight.packed else weight.data
    values = data[:, : weight.scale.shape[1], : weight.size].double()
    if weight.zero_point is not None:
        values = values - weight.zero_point.double()[..., None]
    return values * weight.scale.double()[..., None]


def decoded_rows(x: Quantized, size: int) -> Tensor:
    """float64 [S, M, g]."""
    repeat = len(x.codes) // x.scale.shape[1]
    scale, zero = (part.double().repeat_interleave(repeat, 1).T[..., None] for part in (x.scale, x.zero))
    return (x.codes[..., :size].double() - zero) * scale
