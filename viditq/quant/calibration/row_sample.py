"""Which rows of an input stand for all: pseudo-random, the same whatever the batch.

Legend: L leading axis of a Linear's input, N tokens; E cells (a prompt in a guidance branch), M rows of a
cell.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Of the rows of each prompt, guidance branch and step, so many go into the second moments: one in 16, 8 to 64.
MOMENT_SHARE, MOMENT_ROWS = 16, (8, 64)
RANK_BITS = 20


class Candidates(NamedTuple):
    """Rows of one input, by index into its L N rows: those the reservoir may want, with their keys; and for moments.

    moment_weight: how many rows each of the latter stands for.
    """

    rows: Tensor
    keys: Tensor
    moment_rows: Tensor
    moment_weight: float


def stratified(keys_EM: Tensor, num_rows: int) -> Candidates:
    """Candidates whose keys let every cell (a prompt in a guidance branch) give one row before any gives a second.

    keys_EM: of the M rows of each cell. A new key is the row's rank in its cell, then as many bits of its key as fit.
    """
    cells, num_cell = keys_EM.shape
    num_moment = num_moment_rows(num_cell)
    lowest, index = keys_EM.topk(min(max(num_rows, num_moment), num_cell), largest=False)
    index = index + torch.arange(cells)[:, None] * num_cell
    ranked = (torch.arange(lowest.shape[1]) << (63 - RANK_BITS)) | (lowest >> RANK_BITS)
    keys, best = ranked[:, :num_rows].flatten().topk(min(num_rows, ranked[:, :num_rows].numel()), largest=False)
    rows = index[:, :num_rows].flatten()[best]
    return Candidates(rows, keys, index[:, :num_moment].flatten(), num_cell / num_moment)


def num_moment_rows(num_rows: int) -> int:
    """How many of so many rows of a prompt in a guidance branch and step go into the second moments."""
    lowest, highest = MOMENT_ROWS
    return min(max(num_rows // MOMENT_SHARE, lowest), highest, num_rows)


def row_keys(num_leading: int, num_tokens: int, seeds: Sequence[int], num_elements: int, noise_level: float) -> Tensor:
    """Pseudo-random order of the L N rows of one step, int64 >= 0.

    A row's key depends on its prompt's seed, the noise level and its place inside that prompt's part of the
    batch (branch-major batches, as guidance stacks them), not on its batch mates. When the leading axis is no
    multiple of the batch (packed captions), on all seeds together.
    """
    if num_leading % num_elements:
        seeds, num_elements = [hash(tuple(seeds)) & 0x7FFFFFFF], 1
        frames = num_leading
    else:
        frames = num_leading // num_elements
    element, frame = (
        torch.arange(num_leading).div(frames, rounding_mode="floor"),
        torch.arange(num_leading) % frames,
    )
    branch, prompt = element.div(len(seeds), rounding_mode="floor"), element % len(seeds)
    key_L = _mix(torch.tensor(seeds)[prompt] + (round(noise_level * 2**24) << 32))
    key_L = _mix(key_L + branch * frames + frame)
    return (_mix(key_L[:, None] + torch.arange(num_tokens)) & 0x7FFFFFFFFFFFFFFE).flatten()


def _mix(key: Tensor) -> Tensor:
    """Finaliser of splitmix64 on int64, wrapping."""
    key = key * -7046029254386353131  # 0x9E3779B97F4A7C15
    key ^= (key >> 30).bitwise_and_(0x3FFFFFFFF)
    key *= -4658895280553007687  # 0xBF58476D1CE4E5B9
    key ^= (key >> 27).bitwise_and_(0x1FFFFFFFFF)
    key *= -7723592293110705685  # 0x94D049BB133111EB
    key ^= (key >> 31).bitwise_and_(0x1FFFFFFFF)
    return key
