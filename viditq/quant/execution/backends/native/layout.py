"""Weights as the kernels read them, and back.

Legend: O out_features, C in_features, P panels of 64 outputs, S segments of the in-features with scales of their own,
g = C / S, h = g padded to a multiple of 8. Values are s8: code - 128 at 8 bits, the code itself below.
A panel and segment is [h / 4, 64, 4]: four consecutive inputs of one output lie side by side. Of two such quadruples,
2i and 2i + 1, weights of up to 4 bits share bytes, the first in the low nibbles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from viditq.quant.description.scheme import QuantSpec
from viditq.quant.execution.backends.integer import summable
from viditq.quant.methods.quantizer import QuantizedWeight

PANEL = 64
PADDED_TO = 8


class PackedWeight(NamedTuple):
    """One weight, or several with one input, as `ops.linear` takes it.

    data: int8 [P, S, h/4, 64, 4], or uint8 [P, S, h/8, 64, 4] for up to 4 bits; scale float32, colsum int32 (sums of
    s8) and zero_point int8 (in counts of s8; None = all 0), each [S, 64 P].
    """

    data: Tensor
    scale: Tensor
    colsum: Tensor
    zero_point: Tensor | None
    out_features: int
    in_features: int
    bits: int

    def codes(self) -> Tensor:
        """The uint8 [O, C] that `pack_weight` was given."""
        return unpack_codes(self)


def pack_weight(
    codes_OC: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, segment_size: int | None = None
) -> PackedWeight:
    """codes uint8 [O, C]; scale float32 and zero_point uint8 (None: symmetric): [1, 1], [O, 1] or [O, G, 1].

    segment_size: a divisor of the weight's group size, where activations have smaller groups; None = the same.
    """
    out_features, in_features = codes_OC.shape
    groups = scale.shape[1] if scale.ndim == 3 else 1
    size = summable(segment_size or in_features // groups)
    segments, padded = in_features // size, -(-size // PADDED_TO) * PADDED_TO
    shift = 128 if bits == 8 else 0
    zero = torch.full_like(scale, 2.0 ** (bits - 1)) if zero_point is None else zero_point.float()
    rows = -out_features % PANEL

    def per_segment(values: Tensor) -> Tensor:
        """[S, 64 P] of a scale or zero point."""
        values_OG = values.reshape(values.shape[0], -1).expand(out_features, groups)
        return F.pad(values_OG.repeat_interleave(segments // groups, 1), (0, 0, 0, rows)).T.contiguous()

    signed_OSg = (codes_OC.to(torch.int16) - shift).to(torch.int8).view(out_features, segments, size)
    padded_PSh = F.pad(signed_OSg, (0, padded - size, 0, 0, 0, rows)).view(-1, PANEL, segments, padded // 4, 4)
    data = padded_PSh.permute(0, 2, 3, 1, 4)
    if bits <= 4:
        data = (data[:, :, 0::2] | data[:, :, 1::2] << 4).view(torch.uint8)
    colsum = F.pad(signed_OSg.sum(-1, dtype=torch.int32), (0, 0, 0, rows)).T.contiguous()
    counts = (per_segment(zero) - shift).to(torch.int8)
    counts[:, out_features:] = 0
    return PackedWeight(
        data.contiguous(),
        per_segment(scale.float()),
        colsum,
        counts if counts.any() else None,
        out_features,
        in_features,
        bits,
    )


def unpack_codes(packed: PackedWeight) -> Tensor:
    """Exact inverse of `pack_weight`: uint8 [O, C]."""
    data, size = packed.data, packed.in_features // packed.data.shape[1]
    if packed.bits <= 4:
        data = torch.stack((data & 15, data >> 4), 3).flatten(2, 3)
    rows_PSh = data.permute(0, 3, 1, 2, 4)
    codes = rows_PSh.reshape(-1, rows_PSh.shape[2], math.prod(rows_PSh.shape[3:]))[: packed.out_features, :, :size]
    codes = codes.reshape(packed.out_features, packed.in_features)
    return (codes.to(torch.int16) + (128 if packed.bits == 8 else 0)).to(torch.uint8)


class Rows(NamedTuple):
    """The outputs begin .. end of a weight that was packed together with others, as `Variant.hand_over` takes them."""

    packed: PackedWeight
    begin: int
    end: int

    def codes(self) -> Tensor:
        """uint8 [end - begin, C]."""
        return self.packed.codes()[self.begin : self.end]


def pack_together(parts: Sequence[tuple[QuantizedWeight, QuantSpec]], segment_size: int) -> PackedWeight:
    """One weight of several that read one input (q, k, v), outputs one after the other; formats may differ.

    segment_size: in-features that share all scales, of the weights and of the activation.
    """
    bits = max(spec.bits for _, spec in parts)
    storage = bits if bits <= 4 or all(spec.bits == bits for _, spec in parts) else 8
    segments = parts[0][0].codes.shape[1] // segment_size
    scales: list[Tensor] = []
    zeros: list[Tensor] = []
    for (codes_OC, scale, zero_point), spec in parts:
        zero = torch.full_like(scale, 2.0 ** (spec.bits - 1)) if zero_point is None else zero_point.float()
        for values, kept in ((scale, scales), (zero, zeros)):
            values_OG = values.reshape(len(values), -1).expand(len(codes_OC), -1)
            kept.append(values_OG.repeat_interleave(segments // values_OG.shape[1], 1)[..., None])
    codes_OC = torch.cat([quantized.codes for quantized, _ in parts])
    return pack_weight(codes_OC, torch.cat(scales), torch.cat(zeros), storage, segment_size)
