"""What one input of a Linear adds to its statistics.

Legend: C in_features, L leading axis (one "sample" each), N tokens, n candidate rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CACHE_BYTES = 2**20  # of an input looked at twice in a row, on a CPU


class Summary(NamedTuple):
    """What one input adds to the state of every Linear that reads it.

    minimum, maximum [C]: over everything. amax_sum [C], float32 at least: over samples, of a sample's amax over its
    tokens. num_samples: L. rows [n, C]: candidates of the reservoir; keys [n]: theirs. noise_level: of the step.
    """

    minimum: Tensor
    maximum: Tensor
    amax_sum: Tensor
    num_samples: int
    rows: Tensor
    keys: Tensor
    noise_level: float

    @property
    def finite(self) -> bool:
        """Whether there is neither NaN nor inf in the input."""
        return bool(self.amax_sum.isfinite().all())

    @property
    def nbytes(self) -> int:
        """What it takes in memory, but for the keys, which summaries share."""
        return sum(part.nbytes for part in (self.minimum, self.maximum, self.amax_sum, self.rows))


def summary_of(x_LNC: Tensor, candidates: Tensor, keys: Tensor, noise_level: float) -> Summary:
    """candidates: indices into the L N rows of an input; keys: theirs."""
    rows_nC = x_LNC.flatten(0, 1).index_select(0, candidates)
    num_samples, parts = len(x_LNC), [x_LNC]
    if x_LNC.device.type == "cpu":  # the second look at a part then finds it in the cache
        parts = [*x_LNC.split(max(CACHE_BYTES // x_LNC[0].nbytes, 1))]
    low, high, total = zip(*map(_extremes, parts), strict=True)
    if len(parts) == 1:
        return Summary(low[0], high[0], total[0], num_samples, rows_nC, keys, noise_level)
    minimum_C, maximum_C, total_C = torch.stack(low).amin(0), torch.stack(high).amax(0), torch.stack(total).sum(0)
    return Summary(minimum_C, maximum_C, total_C, num_samples, rows_nC, keys, noise_level)


def _extremes(x_LNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each channel: minimum, maximum, sum of the samples' amax."""
    low_LC, high_LC = x_LNC.amin(1), x_LNC.amax(1)
    minimum_C, maximum_C = low_LC.amin(0), high_LC.amax(0)
    magnitude_LC = torch.maximum(low_LC.neg_(), high_LC, out=high_LC)
    dtype = torch.promote_types(x_LNC.dtype, torch.float32)  # a float64 sum would copy all of them first
    return minimum_C, maximum_C, magnitude_LC.sum(0, dtype=dtype)
