"""How the kernels are cut into blocks."""

from __future__ import annotations

from typing import NamedTuple

LARGEST_INNER = 128
ROWS_OF_A_PRODUCT = 16  # at least, for the instructions; fewer are computed beside masked ones


class Tile(NamedTuple):
    """Of a product: rows and outputs of one program, warps that compute it, stages of its loads (num_stages)."""

    rows: int
    outs: int
    warps: int
    stages: int


FEW, SOME = Tile(16, 64, 4, 4), Tile(64, 128, 4, 3)
MANY = (Tile(128, 128, 8, 3), Tile(128, 256, 8, 3), Tile(64, 256, 8, 3), Tile(256, 128, 8, 3), Tile(128, 64, 4, 4))
"""The first where nothing was measured; the others are what a trial times (the larger ones take an sm_90's memory)."""

FLOAT8_SOME = Tile(64, 128, 8, 4)
FLOAT8_MANY = (MANY[0], FLOAT8_SOME, Tile(128, 64, 8, 4))
"""Of FP8, whose two accumulators fit no larger ones: ptxas spills none of these on sm_89 and sm_90."""


def tile_for(num_rows: int) -> Tile:
    """Without measuring anything."""
    if num_rows <= FEW.rows:
        return FEW
    return SOME if num_rows <= SOME.rows * 4 else MANY[0]


def tiles_for(num_rows: int) -> tuple[Tile, ...]:
    """Those worth a trial, `tile_for` first."""
    first = tile_for(num_rows)
    return MANY if first == MANY[0] else (first,)


def float8_tiles_for(num_rows: int) -> tuple[Tile, ...]:
    """The same of FP8; the first where nothing is measured."""
    if num_rows <= FEW.rows:
        return (FEW,)
    return (FLOAT8_SOME,) if num_rows <= SOME.rows * 4 else FLOAT8_MANY


def padded_width(size: int) -> int:
    """In-features that a segment of `size` takes in memory: whole blocks of the inner loop; 32 is what int8 takes."""
    block = 64 if size >= 512 else 32
    return -(-size // block) * block


def inner_block(padded: int) -> int:
    """The largest power of two, up to 128, that divides a padded width."""
    return min(padded & -padded, LARGEST_INNER)


def power_of_two(count: int) -> int:
    """The smallest that is not below `count`."""
    return 1 << max(count - 1, 0).bit_length()
