"""Regular Hadamard matrices, whose rows all have the same sum, applied to groups of neighbouring channels.

H = R kron ... kron R / sqrt(g), R the regular Hadamard matrix of order 4 and g a power of 4: symmetric and orthogonal,
so its own inverse. An offset that all channels share stays what it is, in every channel, where Sylvester's matrices
gather it in one.

Legend: g channels of a group; x [..., C], C = G g.
"""

from functools import lru_cache

import torch
from torch import Tensor

from viditq.quant.numerics.hadamard import constant

FACTOR = 16  # 256 channels as 16 x 16: a quarter of the time of one product with the dense matrix
ORDER_4 = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


def rotate_groups(x: Tensor, group_size: int) -> Tensor:
    """Each group of `x` times H, [..., C] -> a new tensor [..., C], in the floating type of `x`."""
    if group_size != FACTOR**2:
        return (x.reshape(-1, group_size) @ _matrix(group_size, x.dtype, x.device)).view(x.shape)
    factor = _matrix(FACTOR, x.dtype, x.device)
    rows = (x.reshape(-1, FACTOR) @ factor).view(-1, FACTOR, FACTOR)
    return torch.matmul(factor, rows).view(x.shape)


def regular_matrix(order: int) -> Tensor:
    """H as float64 [g, g]; order: a power of 4."""
    smallest = torch.tensor(ORDER_4, dtype=torch.float64)
    matrix = smallest
    while len(matrix) < order:
        matrix = torch.kron(matrix, smallest)
    if len(matrix) != order:
        raise ValueError(f"order={order} is no power of 4")
    return matrix / order**0.5


@lru_cache(maxsize=64)
@constant
def _matrix(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return regular_matrix(order).to(device, dtype)
