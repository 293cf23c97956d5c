"""How SDNQ (0.2.8) lays out codes of a Linear's weight: bytes as they are, fewer bits packed in small blocks.

Written from the layout alone, without SDNQ, whose licence (GPL) would be that of all that imports it.

Legend: O out_features, C in_features, G groups of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from viditq.export.part import row_scale
from viditq.quant.methods.quantizer import QuantizedWeight

Piece = tuple[int, int, int, int, int]
"""(code of a block, its first bit, how many, byte of the block, from which bit on)."""

LAYOUTS: dict[int, tuple[int, int, list[Piece]]] = {  # bits -> codes and bytes of a block
    2: (4, 1, [(i, 0, 2, 0, 2 * i) for i in range(4)]),
    3: (
        8,
        3,
        [
            *[(i, 0, 3, i, 0) for i in range(3)],
            *[(3 + i, 0, 3, i, 3) for i in range(3)],
            *[(6, 0, 2, 0, 6), (7, 0, 2, 1, 6), (6, 2, 1, 2, 6), (7, 2, 1, 2, 7)],
        ],
    ),
    4: (2, 1, [(0, 0, 4, 0, 0), (1, 0, 4, 0, 4)]),
    5: (
        8,
        5,
        [
            *[(i, 0, 5, i, 0) for i in range(5)],
            *[(5 + i, 0, 3, i, 5) for i in range(3)],
            *[(5, 3, 2, 3, 5), (6, 3, 2, 4, 5), (7, 4, 1, 3, 7), (7, 3, 1, 4, 7)],
        ],
    ),
    6: (4, 3, [*[(i, 0, 6, i, 0) for i in range(3)], *[(3, 4 - 2 * i, 2, i, 6) for i in range(3)]]),
    7: (8, 7, [*[(i, 0, 7, i, 0) for i in range(7)], *[(7, 6 - i, 1, i, 7) for i in range(7)]]),
}


def packed_shape(shape: tuple[int, int], bits: int) -> tuple[int, ...] | None:
    """Of `packed`; None where the codes fill no whole blocks."""
    codes, num_bytes, _ = LAYOUTS[bits]
    blocks, rest = divmod(shape[0] * shape[1], codes)
    return None if rest else (blocks,) if num_bytes == 1 else (blocks, num_bytes)


def packed(codes_OC: Tensor, bits: int) -> Tensor:
    """uint8 codes -> uint8 [blocks] or [blocks, bytes of a block]."""
    codes, num_bytes, pieces = LAYOUTS[bits]
    blocks = codes_OC.reshape(-1, codes)
    out = blocks.new_zeros(len(blocks), num_bytes)
    for code, first, count, byte, at in pieces:
        out[:, byte] |= ((blocks[:, code] >> first) & (2**count - 1)) << at
    return out[:, 0].contiguous() if num_bytes == 1 else out


def stored_weight(quantized: QuantizedWeight, bits: int, symmetric: bool, groups: int, turned: bool) -> Tensor:
    """As SDNQ has it. turned: it lies [C, O], as its integer product wants bytes."""
    codes_OC = quantized.codes
    if bits < 8:
        return packed(codes_OC, bits)
    stored_OC = (codes_OC ^ 128).view(torch.int8) if symmetric else codes_OC
    if groups > 1:
        return stored_OC.unflatten(1, (groups, -1))
    return stored_OC.T.contiguous() if turned else stored_OC


def stored_grid(values: Tensor, rows: int, turned: bool) -> Tensor:
    """float32 [O, 1], [1, O] or [O, G, 1] of a value a row or group; one for the whole weight is repeated."""
    if values.ndim == 3 and values.shape[1] > 1:
        return values.float()
    return row_scale(values, rows).T if turned else row_scale(values, rows)
