"""Standard errors of what is no mean over prompts, by leaving out a group of prompts at a time."""

from collections.abc import Callable

import torch
from torch import Tensor


def group_jackknife(statistic: Callable[[Tensor], Tensor], number: int, groups: int) -> tuple[Tensor, Tensor]:
    """`statistic` of all rows and its standard errors, [k] each; `statistic(kept) -> [k]` for ascending int64 rows.

    Row i is in group i mod `groups`, so a drift over rows touches every group alike. With g groups of m_j of n rows
    and h_j = n / m_j the squared error is mean_j (h_j t - (h_j - 1) t_j - T)^2 / (h_j - 1), where T = g t - sum_j
    (1 - 1 / h_j) t_j (Busing, Meijer and van der Leeden 1999); for equal groups it is (g - 1) / g sum_j (t_j - mean)^2.
    """
    rows = torch.arange(number)
    groups = min(groups, number)
    whole = statistic(rows)
    parts = torch.stack([statistic(rows[rows % groups != j]) for j in range(groups)])
    sizes = torch.stack([(rows % groups == j).sum() for j in range(groups)])
    h = (number / sizes.to(whole))[:, None]
    centre = groups * whole - ((1 - 1 / h) * parts).sum(0)
    errors = ((h * whole - (h - 1) * parts - centre).square() / (h - 1)).mean(0).sqrt()
    return whole, errors
