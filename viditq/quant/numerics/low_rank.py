"""Low-rank branch (SVDQuant, arXiv 2411.05007): W = U V + R, U V in 16 bits, R quantized.

Legend: O out_features, C in_features, r rank.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from viditq.errors import UserError

ITERATIONS, SUBSPACE_STEPS = 5, 2


def check_rank(rank: int | None, in_features: int, out_features: int, layer: str) -> None:
    """Raises UserError unless the branch is of lower rank than the weight."""
    if rank is not None and rank >= min(in_features, out_features):
        raise UserError(
            f"low_rank={rank} is no lower than the rank of {layer}, a weight of {out_features} x {in_features}; give a "
            "smaller one, for this layer alone by a rule"
        )


def truncated(weight_OC: Tensor, rank: int, start_Or: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """U [O, r], V [r, C] of the best U V in the least-squares sense, of balanced size (|U_:i| = |V_i:|), float32.

    By the eigenvectors of the smaller Gram matrix, in float64: faster than a whole SVD. start_Or: the U of a matrix
    close to this one, from which two steps of subspace iteration come about as near for a hundredth of the time.
    """
    if start_Or is not None:
        basis_Or = torch.linalg.qr(start_Or).Q
        for _ in range(SUBSPACE_STEPS):
            basis_Or = torch.linalg.qr(weight_OC @ (weight_OC.T @ basis_Or)).Q
        return _balanced(basis_Or, weight_OC)
    if len(weight_OC) > weight_OC.shape[1]:
        down_Cr, up_rO = truncated(weight_OC.T, rank)
        return up_rO.T, down_Cr.T
    exact_OC = weight_OC.double()
    return _balanced(torch.linalg.eigh(exact_OC @ exact_OC.T).eigenvectors[:, -rank:].to(weight_OC.dtype), weight_OC)


def _balanced(basis_Or: Tensor, weight_OC: Tensor) -> tuple[Tensor, Tensor]:
    """The projection of the weight on an orthonormal basis as two factors of equal size."""
    rest_rC = basis_Or.T @ weight_OC
    norm_r = rest_rC.norm(dim=1)
    root_r = norm_r.where(norm_r > 0, 1).sqrt()
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
    least, target_OC, start_Or = torch.inf, weight_OC, None
    for _ in range(iterations):
        start_Or, exact_rC = truncated(target_OC, rank, start_Or)
        up_Or, down_rC = start_Or.to(dtype).float(), exact_rC.to(dtype).float()
        branch_OC = up_Or @ down_rC
        kept_OC = quantized(weight_OC - branch_OC)
        current = float(error(weight_OC - branch_OC - kept_OC))
        if best is None or current < least:
            best, least = (up_Or, down_rC), current
        target_OC = weight_OC - kept_OC
    assert best is not None
    return best
