"""Weights as signed numbers of 8 bits, segment by segment: what matrix products of int8 read.

Legend: O out_features, C in_features, S segments of C that share all scales, g = C / S, h = g padded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.execution.backends.integer import stored_grid
from viditq.quant.methods.quantizer import QuantizedWeight

SHORT_SUMS = 255  # in-features whose codes' sum an int16 holds


class SignedWeight(NamedTuple):
    """data int8 [S, O padded, h], code - 128 at 8 bits, the code below; packed: uint8 [S, O, h / 2], of two neighbours
    the first in the low nibble. scale float32, zero_point int8 (counted as data; None = all 0), colsum int16 or int32:
    [S, O].
    """

    data: Tensor
    scale: Tensor
    zero_point: Tensor | None
    colsum: Tensor
    size: int
    shift: int
    packed: bool

    @property
    def in_features(self) -> int:
        return len(self.scale) * self.size

    def moved(self, move: Callable[[Tensor], Tensor]) -> SignedWeight:
        """The same with each of its tensors moved."""
        zero_point = None if self.zero_point is None else move(self.zero_point)
        moved = self._replace(data=move(self.data), scale=move(self.scale))
        return moved._replace(zero_point=zero_point, colsum=move(self.colsum))

    def first(self, outs: int) -> SignedWeight:
        """Of the first outputs."""
        zero_point = None if self.zero_point is None else self.zero_point[:, :outs].contiguous()
        data, scale, colsum = (part[:, :outs].contiguous() for part in (self.data, self.scale, self.colsum))
        return self._replace(data=data, scale=scale, zero_point=zero_point, colsum=colsum)

    def codes(self) -> Tensor:
        """uint8 [O, C]."""
        data = torch.stack((self.data & 15, self.data >> 4), -1).flatten(-2) if self.packed else self.data
        codes_OSg = data[:, : self.scale.shape[1], : self.size].transpose(0, 1).to(torch.int16) + self.shift
        return codes_OSg.flatten(1).to(torch.uint8)

    def grid(self, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point as `signed_weight` was given them."""
        counts_OS = None if self.zero_point is None else self.zero_point.T
        return stored_grid(self.scale.T, counts_OS, self.shift, spec, self.in_features)


def signed_weight(
    quantized: QuantizedWeight, bits: int, size: int, padded: int, rows_padded_to: int = 1, packed: bool = False
) -> SignedWeight:
    """size: g, a divisor of the weight's groups. padded: h, even where packed, which takes up to 4 bits."""
    codes_OC, scale, zero_point, _ = quantized
    shift = 128 if bits == 8 else 0
    out_features, in_features = codes_OC.shape
    segments = in_features // size

    def per_segment(values: Tensor) -> Tensor:
        values_OG = values.reshape(len(values), -1).expand(out_features, -1)
        return values_OG.repeat_interleave(segments // values_OG.shape[1], 1).T.contiguous()

    data_OSg = (codes_OC.to(torch.int16) - shift).to(torch.int8).view(out_features, segments, size)
    data = F.pad(data_OSg.transpose(0, 1), (0, padded - size, 0, -out_features % rows_padded_to)).contiguous()
    colsum = data.sum(-1, dtype=torch.int32)[:, :out_features]
    colsum = colsum.to(torch.int16) if size <= SHORT_SUMS else colsum
    if packed:
        data = (data[..., 0::2] | data[..., 1::2] << 4).view(torch.uint8)
    zero = torch.full_like(scale, 2.0 ** (bits - 1)) if zero_point is None else zero_point
    counts = (per_segment(zero).to(torch.int16) - shift).to(torch.int8)
    return SignedWeight(data, per_segment(scale.float()), counts if counts.any() else None, colsum, size, shift, packed)


def bytes_per_segment(size: int) -> int:
    """Of an output: scale, zero point, sum of codes."""
    return 7 if size <= SHORT_SUMS else 9
