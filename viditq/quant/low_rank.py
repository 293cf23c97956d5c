"""Low-rank branch (SVDQuant, arXiv 2411.05007): W = U V + R, U V in 16 bits, R quantized.

Legend: O out_features, C in_features, r rank.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from viditq.errors import UserError

ITERATIONS = 5


def check_rank(rank: int | None, in_features: int, out_features: int, layer: str) -> None:
    """Raises UserError unless the branch is of lower rank than the weight."""
    if rank is not None and rank >= min(in_features, out_features):
        raise UserError(
            f"low_rank={rank} is no lower than the rank of {layer}, a weight of {out_features} x {in_features}; give a "
            "smaller one, for this layer alone by a rule"
        )


def truncated(weight_OC: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U [O, r], V [r, C] of the best U V in the least-squares sense, of balanced size (U^T U = V V^T), float32.

    By the eigenvectors of the smaller Gram matrix, in float64: an order of magnitude faster than a whole SVD.
    """
    if len(weight_OC) > weight_OC.shape[1]:
        down_Cr, up_rO = truncated(weight_OC.T, rank)
        return up_rO.T, down_Cr.T
    exact_OC = weight_OC.double()
    basis_Or = torch.linalg.eigh(exact_OC @ exact_OC.T).eigenvectors[:, -rank:].flip(1).to(weight_OC.dtype)
    rest_rC = basis_Or.T @ weight_OC
    root_r = rest_rC.norm(dim=1).clamp(min=1e-30).sqrt()
    return basis_Or * root_r, rest_rC / root_r[:, None]


def fit_low_rank(
    weight_OC: Tensor,
    rank: int,
    dtype: torch.dtype,
    quantized: Callable[[Tensor], Tensor],
    error: Callable[[Tensor], Tensor],
    iterations: int = ITERATIONS,
) -> tuple[Tensor, Tensor]:
    """U, V as `dtype` holds them, by alternation: U V = the best for W - Q(R), then R = W - U V; the best one seen.

    quantized: R -> Q(R). error: W - U V - Q(R) -> what is to be small.
    """
    best: tuple[Tensor, Tensor] | None = None
    least, target_OC = torch.inf, weight_OC
    for _ in range(iterations):
        up_Or, down_rC = (part.to(dtype).float() for part in truncated(target_OC, rank))
        branch_OC = up_Or @ down_rC
        kept_OC = quantized(weight_OC - branch_OC)
        current = float(error(weight_OC - branch_OC - kept_OC))
        if best is None or current < least:
            best, least = (up_Or, down_rC), current
        target_OC = weight_OC - kept_OC
    assert best is not None
    return best
