"""95 % intervals of a mean over prompts, by resampling them. Legend: n prompts, R resamples."""

import math
from statistics import NormalDist

import torch
from torch import Tensor

Interval = tuple[float, float]
NORMAL = NormalDist()
TAIL = 0.025  # what a 95 % interval leaves out on either side
Z = NORMAL.inv_cdf(1 - TAIL)
MIN_PROMPTS = 5  # of four, chance alone puts all on the worse side in 1 of 16 cases: no 95 % interval can be made
CHUNK = 2**22  # resampled values held at once: 32 MiB of positions and as much of values


def t_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: exact for 1 and 2 degrees of freedom, else within 1 %.

    Abramowitz and Stegun 26.7.5, an expansion in 1 / freedom.
    """
    if freedom == 1:
        return math.tan(math.pi * (0.5 - TAIL))
    if freedom == 2:
        return (1 - 2 * TAIL) / math.sqrt(2 * TAIL * (1 - TAIL))
    first = (Z**3 + Z) / 4
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    third = (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384
    return Z + first / freedom + second / freedom**2 + third / freedom**3


def tail(count: int) -> float:
    """Where to cut the resampled means of `count` values for 95 %: a little below TAIL.

    Resampled means spread too little, by sqrt((n - 1) / n), and like the normal, not like Student's t. Cutting at
    Phi(-sqrt(n / (n - 1)) t_(n-1)) makes up for both: Hesterberg 2015's expanded percentile interval.
    """
    return NORMAL.cdf(-math.sqrt(count / (count - 1)) * t_quantile(count - 1))


def resampled_means(values: Tensor, num_resamples: int, seed: int) -> Tensor:
    """Means of R draws of n values with replacement from [n], float64 [R].

    Values are sorted first, so that their order does not matter; at most CHUNK of them are drawn at once.
    """
    ordered, count = values.double().cpu().sort().values, len(values)
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, CHUNK // count)
    sizes = [min(rows, num_resamples - start) for start in range(0, num_resamples, rows)]
    return torch.cat([ordered[torch.randint(count, (size, count), generator=generator)].mean(1) for size in sizes])


def bootstrap_interval(values: Tensor, num_resamples: int = 10_000, seed: int = 0) -> Interval | None:
    """The 95 % interval of the mean of [n]; None for fewer than MIN_PROMPTS values or one that is not finite."""
    if len(values) < MIN_PROMPTS or not values.isfinite().all():
        return None
    cut = tail(len(values))
    means = resampled_means(values, num_resamples, seed)
    low, high = means.quantile(torch.tensor([cut, 1 - cut], dtype=means.dtype)).tolist()
    return low, high


def normal_interval(value: float, error: float) -> Interval | None:
    """value -+ 1.96 standard errors; None where either is not finite."""
    low, high = value - Z * error, value + Z * error
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None
