"""Weights as the kernels read them, and back.

Legend: O out_features, C in_features, P panels of 64 outputs, S segments of the in-features with scales of their own,
g = C / S, h = g padded to a multiple of 8. Values are s8: code - 128 at 8 bits, the code itself below.
A panel and segment is [h / 4, 64, 4]: four consecutive inputs of one output lie side by side. Of two such quadruples,
2i and 2i + 1, weights of up to 4 bits share bytes, the first in the low nibbles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.execution.backends.integer import stored_grid, summable

PANEL = 64
PADDED_TO = 8
PIECE_CODES = 2**21  # that are packed at once


class PackedWeight(NamedTuple):
    """One weight, or several with one input, as `ops.linear` takes it.

    data: int8 [P, S, h/4, 64, 4], or uint8 [P, S, h/8, 64, 4] for up to 4 bits; scale float32, or float16 where that
    holds all of several segments exactly, and zero_point int8 (in counts of s8; None = all 0), each [P, S, 64].
    """

    data: Tensor
    scale: Tensor
    zero_point: Tensor | None
    out_features: int
    in_features: int
    bits: int

    def moved(self, move: Callable[[Tensor], Tensor]) -> PackedWeight:
        """The same with each of its tensors moved."""
        zero_point = None if self.zero_point is None else move(self.zero_point)
        return self._replace(data=move(self.data), scale=move(self.scale), zero_point=zero_point)

    def codes(self) -> Tensor:
        """The uint8 [O, C] that `pack_weight` was given."""
        return unpack_codes(self)

    def grid(self, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
        """The scale and zero point that `pack_weight` was given."""
        scale_OS, counts_OS = (
            None if part is None else part.transpose(1, 2).flatten(0, 1)[: self.out_features]
            for part in (self.scale, self.zero_point)
        )
        assert scale_OS is not None
        return stored_grid(scale_OS.float(), counts_OS, 128 if self.bits == 8 else 0, spec, self.in_features)

    def joins(self, other: PackedWeight) -> bool:
        """Whether `joined` takes both: equal widths in whole panels."""
        same = self.bits == other.bits and self.data.shape[1:] == other.data.shape[1:]
        return same and self.out_features % PANEL == 0 and other.out_features % PANEL == 0


def pack_weight(
    codes_OC: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, segment_size: int | None = None
) -> PackedWeight:
    """codes uint8 [O, C]; scale float32 and zero_point uint8 (None: symmetric): [1, 1], [O, 1] or [O, G, 1].

    segment_size: a divisor of the weight's group size, where activations have smaller groups; None = the same.
    Some rows at a time: what is made of codes on the way takes several times their memory.
    """
    rows = max(PIECE_CODES // codes_OC.shape[1] // PANEL, 1) * PANEL

    def part(values: Tensor | None, start: int) -> Tensor | None:
        return values if values is None or len(values) == 1 else values[start : start + rows]

    starts = range(0, max(len(codes_OC), 1), rows)
    grids = [(part(scale, start), part(zero_point, start)) for start in starts]
    pieces = [
        _pack_rows(codes_OC[start : start + rows], s, z, bits, segment_size)
        for start, (s, z) in zip(starts, grids, strict=True)
        if s is not None
    ]
    return pieces[0] if len(pieces) == 1 else joined(pieces)


def _pack_rows(
    codes_OC: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, segment_size: int | None
) -> PackedWeight:
    out_features, in_features = codes_OC.shape
    groups = scale.shape[1] if scale.ndim == 3 else 1
    size = summable(segment_size or in_features // groups)
    segments, padded = in_features // size, -(-size // PADDED_TO) * PADDED_TO
    shift = 128 if bits == 8 else 0
    zero = torch.full_like(scale, 2.0 ** (bits - 1)) if zero_point is None else zero_point.float()
    rows = -out_features % PANEL

    def per_segment(values: Tensor) -> Tensor:
        """[P, S, 64] of a scale or zero point; 0 where there is no output."""
        values_OG = values.reshape(values.shape[0], -1).expand(out_features, groups)
        values_OS = F.pad(values_OG.repeat_interleave(segments // groups, 1), (0, 0, 0, rows))
        return values_OS.view(-1, PANEL, segments).transpose(1, 2).contiguous()

    signed_OSg = (codes_OC.to(torch.int16) - shift).to(torch.int8).view(out_features, segments, size)
    padded_PSh = F.pad(signed_OSg, (0, padded - size, 0, 0, 0, rows)).view(-1, PANEL, segments, padded // 4, 4)
    data = padded_PSh.permute(0, 2, 3, 1, 4)
    if bits <= 4:
        data = (data[:, :, 0::2] | data[:, :, 1::2] << 4).view(torch.uint8)
    counts = per_segment(zero - shift).to(torch.int8)
    return PackedWeight(
        data.contiguous(),
        _narrow(per_segment(scale.float())),
        counts if counts.any() else None,
        out_features,
        in_features,
        bits,
    )


def _narrow(scale_PSn: Tensor) -> Tensor:
    """In float16 where that loses nothing: scales of groups are a tenth of a weight of 4 bits, others not worth it."""
    half = scale_PSn.half()
    return half if scale_PSn.shape[1] > 1 and torch.equal(half.float(), scale_PSn) else scale_PSn


def joined(weights: Sequence[PackedWeight]) -> PackedWeight:
    """One weight whose outputs are those of all, in turn; each `joins` the others. One scale in float32: all are."""
    zero_points = None
    if any(w.zero_point is not None for w in weights):
        nothing = [torch.zeros_like(w.scale, dtype=torch.int8) for w in weights]
        zero_points = torch.cat(
            [n if w.zero_point is None else w.zero_point for n, w in zip(nothing, weights, strict=True)]
        )
    return PackedWeight(
        torch.cat([w.data for w in weights]),
        torch.cat([w.scale for w in weights]),
        zero_points,
        sum(w.out_features for w in weights),
        weights[0].in_features,
        weights[0].bits,
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
