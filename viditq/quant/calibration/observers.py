"""Observers of the inputs of Linears: of fixed size, bucketed by noise level, merged without regard to order.

Legend: K buckets, C in_features, R reservoir rows of a bucket.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from viditq.errors import UserError

NUM_BUCKETS = 20
ROWS_PER_BUCKET = 16
NO_KEY = torch.iinfo(torch.int64).max  # key of a free place in the reservoir
REDUCTIONS = {
    "minimum": "min",
    "maximum": "max",
    "amax_sum": "sum",
    "count": "sum",
    "lowest_level": "min",
    "highest_level": "max",
    "rows": "lowest",
    "keys": "lowest",
}
MERGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"min": torch.minimum, "max": torch.maximum, "sum": torch.add}


def blank_state(
    leading: tuple[int, ...],
    num_buckets: int,
    in_features: int,
    rows_per_bucket: int,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """State of `leading` observers that have seen nothing; dtype: of the rows."""
    buckets = (*leading, num_buckets)
    channels, rows = (*buckets, in_features), (*buckets, rows_per_bucket)
    return {
        "minimum": torch.full(channels, torch.inf, device=device),
        "maximum": torch.full(channels, -torch.inf, device=device),
        "amax_sum": torch.zeros(channels, dtype=torch.float64, device=device),
        "count": torch.zeros(buckets, dtype=torch.int64, device=device),
        "lowest_level": torch.full(buckets, torch.inf, dtype=torch.float64, device=device),
        "highest_level": torch.full(buckets, -torch.inf, dtype=torch.float64, device=device),
        "rows": torch.zeros(*rows, in_features, dtype=dtype, device=device),
        "keys": torch.full(rows, NO_KEY, device=device),
    }


class Observer:
    """State of one Linear; `ObserverBank` adds to it.

    minimum, maximum [K, C]: over everything. amax_sum [K, C] float64 and count [K]: sum over samples of a
    sample's amax over its tokens. lowest_level, highest_level [K] float64: of the steps. rows [K, R, C] with keys
    [K, R]: the input rows of the lowest keys, in a type that holds all of them to the bit.
    """

    minimum: Tensor
    maximum: Tensor
    amax_sum: Tensor
    count: Tensor
    lowest_level: Tensor
    highest_level: Tensor
    rows: Tensor
    keys: Tensor

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.hold(state)

    def hold(self, state: Mapping[str, Tensor]) -> None:
        """Takes these very tensors, one per field."""
        for field in REDUCTIONS:
            setattr(self, field, state[field])

    def reached(self, lo: float, hi: float) -> list[int]:
        """Buckets with steps in the segment (lo, hi], to which 0 belongs as well where it is the first; ascending."""
        levels = zip(self.lowest_level.tolist(), self.highest_level.tolist(), strict=True)
        return [i for i, (low, high) in enumerate(levels) if low <= hi and (high > lo or lo == high == 0)]

    def within(self, lo: float, hi: float) -> list[int]:
        """The same; raises UserError where such a bucket has steps of another segment as well."""
        buckets, num_all = self.reached(lo, hi), len(self.count)
        for i in buckets:
            low, high = float(self.lowest_level[i]), float(self.highest_level[i])
            if high > hi or (low <= lo and lo > 0):
                raise UserError(
                    f"an edge of the segment of noise levels {lo:g} to {hi:g} parts sampling steps ({low:.4g} to "
                    f"{high:.4g}) that share a bucket of the statistics; move it to {i / num_all:g} or "
                    f"{(i + 1) / num_all:g}, or calibrate with more buckets (calibration.num_buckets, now {num_all})"
                )
        return buckets

    def merged(self, other: "Observer") -> "Observer":
        """With what `other` saw (another rank, another part of the prompts)."""
        num_rows = self.keys.shape[1]
        rows = torch.cat([self.rows, other.rows], 1)
        keys = torch.cat([self.keys, other.keys], 1)
        kept = [_lowest(rows[bucket], keys[bucket], num_rows) for bucket in range(len(keys))]
        state = dict(zip(("rows", "keys"), (torch.stack(parts) for parts in zip(*kept, strict=True)), strict=True))
        for name, reduction in REDUCTIONS.items():
            if reduction in MERGES:
                state[name] = MERGES[reduction](getattr(self, name), getattr(other, name))
        return Observer(state)


def _lowest(rows: Tensor, keys: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    keys, order = keys.topk(num_rows, largest=False, sorted=True)
    return rows[order], keys
