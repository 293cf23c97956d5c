"""Powers of two that bring tensors to a size at which their squares neither overflow nor vanish.

A product with a power of two is exact: what is computed at that size is what was asked for, to the bit.
"""

import torch
from torch import Tensor

LARGEST_EXPONENT = 126  # of powers of two that float32 holds with their inverses


def power_of_two(largest: Tensor) -> Tensor:
    """What `largest` is divided by to lie in [0.5, 1), in its own type; 1 for 0."""
    exponent = largest.frexp().exponent.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
    return torch.ldexp(torch.ones_like(largest), exponent)


def at_unit_size(values_SE: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [S, E] of magnitudes below 1, and the powers of two [S, 1] by which they were divided."""
    size_S1 = power_of_two(values_SE.abs().amax(1, True))
    return values_SE / size_S1, size_S1
