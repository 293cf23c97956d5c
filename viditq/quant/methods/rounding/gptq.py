"""GPTQ: columns are rounded one after the other, and what each loses is made good by those that follow.

With H = X^T X of the layer's inputs, H^-1 = U^T U (U upper triangular) and column i rounded with the error e_i =
(w_i - w^_i) / U_ii, the columns j > i become w_j - e_i U_ij: the best answer to the error so far (optimal brain
quantization with a fixed order). Frantar et al., arXiv 2210.17323. Legend: O out_features, C in_features;
W is worked on transposed [C, O], so that a column of the weight is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.registry import ROUNDINGS
from viditq.quant.description.specs import RoundingSpec
from viditq.quant.methods.quantizer import Grid, QuantizedWeight, stored
from viditq.quant.numerics.affine import code_range
from viditq.quant.numerics.granularity import per_weight

BLOCK = 128  # columns whose later neighbours outside the block wait for one matrix product


@ROUNDINGS.register("gptq")
@dataclass(frozen=True)
class Gptq(RoundingSpec):
    """On the grid that `ranges` laid over the weight as given.

    damping: share of the mean of diag(H) added to it. descending: columns in order of falling H_ii instead of their
    own, so that what hurts most is rounded while most columns can still answer.
    """

    name: ClassVar[str] = "gptq"
    needs_moments: ClassVar[bool] = True

    damping: float = 0.01
    descending: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.damping, int | float) or isinstance(self.damping, bool) or not 0 < self.damping <= 1:
            raise UserError(
                f"damping={self.damping!r} is not possible: give a number above 0 and up to 1, such as 0.01"
            )
        if not isinstance(self.descending, bool):
            raise UserError(f"descending={self.descending!r} must be true or false")

    def quantize(self, weight_OC: Tensor, spec: QuantSpec, grid: Grid, moments_CC: Any) -> QuantizedWeight:
        weight_OC = weight_OC.detach().float()
        moments_CC = moments_CC.float()
        diagonal_C = damped_diagonal(moments_CC.diagonal(), self.damping)
        order = torch.arange(len(diagonal_C), device=diagonal_C.device)
        if self.descending:
            order = diagonal_C.argsort(descending=True, stable=True)
        scale_OC, zero_OC = (per_weight(part, weight_OC, spec.group_size) for part in grid)
        weight_CO, scale_CO, zero_CO = (t.T[order] for t in (weight_OC, scale_OC, zero_OC))
        root_CC, limits = inverse_root(moments_CC, diagonal_C, order), code_range(spec.bits, spec.symmetric)
        codes_CO = _rounded(weight_CO, scale_CO, zero_CO, root_CC, limits)
        codes_OC = torch.empty_like(codes_CO).index_copy_(0, order, codes_CO).T
        return stored(codes_OC.contiguous(), grid, spec)


def damped_diagonal(diagonal_C: Tensor, damping: float) -> Tensor:
    """What makes H positive definite: inputs that are always 0 get mean(diag) on the diagonal (1 where all are), then
    all get damping x mean(diag) more.
    """
    out, dead = diagonal_C.clone(), diagonal_C <= 0
    out[dead] = diagonal_C.mean() if not dead.all() else 1.0
    return out.add_(damping * out.mean())


def inverse_root(moments_CC: Tensor, diagonal_C: Tensor, order: Tensor) -> Tensor:
    """Upper triangular U with H^-1 = U^T U, without forming H^-1: U = R^-1 where H = R R^T, R upper triangular.

    H has the columns and rows of `moments_CC` in this order, and `diagonal_C` on its diagonal. Two more of its size are
    held at once: it can be a gigabyte.
    """
    root, failed = _cholesky(moments_CC, diagonal_C, order, torch.float32)
    if failed:  # rounding of float32 sums can cost the last of positive definiteness
        del root
        root, failed = _cholesky(moments_CC, diagonal_C, order, torch.float64)
    if failed:
        raise UserError(
            "GPTQ cannot invert the second moments of a layer: its inputs are too alike for so small a damping "
            "(quant.rounding.damping). Give 0.01, or ten times what was given."
        )
    root = root.flip(0, 1)
    eye = torch.eye(len(root), dtype=root.dtype, device=root.device)
    return torch.linalg.solve_triangular(root, eye, upper=True, out=eye).float()


def _cholesky(moments_CC: Tensor, diagonal_C: Tensor, order: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The lower factor of H with its last row and column first, and whether there is none."""
    backwards = order.flip(0)
    flipped_CC = torch.empty_like(moments_CC, dtype=dtype).T  # by columns, as LAPACK has it
    for c in range(0, len(order), BLOCK):
        flipped_CC[:, c : c + BLOCK] = moments_CC.index_select(1, backwards[c : c + BLOCK])[backwards]
    flipped_CC.diagonal().copy_(diagonal_C[backwards])
    failed = torch.empty((), dtype=torch.int32, device=order.device)
    torch.linalg.cholesky_ex(flipped_CC, out=(flipped_CC, failed))
    return flipped_CC, failed


def _rounded(weight_CO: Tensor, scale_CO: Tensor, zero_CO: Tensor, root_CC: Tensor, limits: tuple[int, int]) -> Tensor:
    """Codes [C, O] as `affine` counts them, int16; overwrites `weight_CO`."""
    codes_CO = torch.empty_like(weight_CO, dtype=torch.int16)
    for start in range(0, len(weight_CO), BLOCK):
        stop = min(start + BLOCK, len(weight_CO))
        errors = torch.empty_like(weight_CO[start:stop])
        for i in range(start, stop):
            codes = (weight_CO[i] / scale_CO[i]).round_().add_(zero_CO[i]).clamp_(*limits)
            codes_CO[i] = codes
            error = (weight_CO[i] - (codes - zero_CO[i]) * scale_CO[i]) / root_CC[i, i]
            weight_CO[i + 1 : stop].addr_(root_CC[i, i + 1 : stop], error, alpha=-1)
            errors[i - start] = error
        weight_CO[stop:].addmm_(root_CC[start:stop, stop:].T, errors, alpha=-1)
    return codes_CO
