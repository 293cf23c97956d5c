"""Kernel distance between the features of two sets of clips (KID: Inception features of images).

Axes: B clips, N clips of all batches, R rows of them at once, D features, G groups.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from viditq.metrics.frechet import GROUPS, FeatureDistance

ROWS_AT_ONCE = 1024


class KernelSums:
    """Squared maximum mean discrepancy of any groups of N pairs, without a second look at the features.

    Kernel k(x, y) = (x . y / D + 1)^3. Of n kept pairs (a_i, b_i) it is the sum over i != j of k(a_i, a_j) +
    k(b_i, b_j) - k(a_i, b_j) - k(a_j, b_i) over n (n - 1) (Gretton et al. 2012, lemma 6): unbiased also where a_i and
    b_i come from the same noise, and 0 for equal sets. torchmetrics and the first KID keep the terms i = j of the
    mixed kernel.
    """

    def __init__(self, a_ND: Tensor, b_ND: Tensor, groups: int) -> None:
        every = torch.arange(len(a_ND), device=a_ND.device)
        self.group = every % groups
        self.sums_GG = a_ND.new_zeros(groups, groups)
        for rows in every.split(ROWS_AT_ONCE):
            kernel_RN = _kernel(a_ND[rows], a_ND) + _kernel(b_ND[rows], b_ND)
            kernel_RN -= _kernel(a_ND[rows], b_ND) + _kernel(b_ND[rows], a_ND)
            kernel_RN[every[: len(rows)], rows] = 0
            by_column_RG = a_ND.new_zeros(len(rows), groups).index_add_(1, self.group, kernel_RN)
            self.sums_GG.index_add_(0, self.group[rows], by_column_RG)

    def __call__(self, kept: Tensor) -> Tensor:
        """The discrepancy of the pairs `kept`, which hold all of a group or nothing; 0-d float64."""
        groups, number = self.group[kept].unique(), len(kept)
        return self.sums_GG[groups][:, groups].sum() / (number * (number - 1))


def _kernel(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    return (x_ND @ y_MD.T / x_ND.shape[1] + 1) ** 3


class KernelDistance(FeatureDistance):
    """Kernel distance from the samples to the float model's clips or to real ones, times 1000.

    Unbiased: unlike a Frechet distance it does not shrink with more samples, and may be negative. Fewer than 3 prompts
    raise UserError.
    """

    least = 3

    def __init__(self, features: nn.Module, against: str, name: str) -> None:
        super().__init__(features, against, name, unit="x 1e-3")

    def distance_of_rows(self, a_ND: Tensor, b_ND: Tensor) -> Callable[[Tensor], Tensor]:
        """1000 x `KernelSums` of rows that hold all of a jackknife group or nothing."""
        sums = KernelSums(a_ND.double(), b_ND.double(), min(GROUPS, len(a_ND)))
        return lambda rows: 1000 * sums(rows)

    def told(self, num_features: int) -> dict[str, Tensor]:
        """That no number of samples is too small for the value to be right on average."""
        return {"unbiased": torch.tensor(1)}
