"""AdaRound: each weight is rounded down or up, as the layer's output asks, by gradient descent on a soft rounding.

w^ = s (floor(w / s) + h(a)), h = clip(1.2 sigmoid(a) - 0.1, 0, 1), minimising
||X (W - W^)^T||^2 + lambda sum(1 - |2 h - 1|^beta) with beta 20 -> 2 (Nagel et al., arXiv 2004.10568; Q-Diffusion).
A layer's reconstruction error depends on its input rows by H = X^T X alone: tr(E H E^T), E = W - W^. So all observed
rows take part in every step, no input need be stored, and the gradient 2 E H is in closed form.

Legend: O out_features, C in_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.quant.description.fields import is_int
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.registry import ROUNDINGS
from viditq.quant.description.specs import RoundingSpec
from viditq.quant.methods.quantizer import Grid, QuantizedWeight, dequantize_weight, quantize_weight, stored
from viditq.quant.numerics.affine import code_range
from viditq.quant.numerics.granularity import per_weight

STRETCH, SHIFT = 1.2, 0.1  # h reaches 0 and 1 at finite a
BETAS = (20.0, 2.0)
WARM_UP = 0.2  # share of the steps without the term that drives h to 0 or 1


@ROUNDINGS.register("adaround")
@dataclass(frozen=True)
class AdaRound(RoundingSpec):
    """Layer-wise. iterations, learning_rate: of Adam. strength: lambda.

    The reconstruction error counts relative to that of nearest rounding, times the number of weights, so that
    strength means the same in every layer. An output channel that nearest rounding serves better keeps that.
    """

    name: ClassVar[str] = "adaround"
    needs_moments: ClassVar[bool] = True

    iterations: int = 300
    learning_rate: float = 0.1
    strength: float = 10.0

    def __post_init__(self) -> None:
        if not is_int(self.iterations) or self.iterations < 1:
            raise UserError(f"iterations={self.iterations!r} is not possible: give a whole number from 1, such as 300")
        for field in ("learning_rate", "strength"):
            value = getattr(self, field)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise UserError(f"{field}={value!r} is not possible: give a number above 0")

    def quantize(self, weight_OC: Tensor, spec: QuantSpec, grid: Grid, moments_CC: Any) -> QuantizedWeight:
        weight_OC, moments_CC = weight_OC.detach().float(), moments_CC.float()
        nearest = quantize_weight(weight_OC, spec, grid)
        error_O = row_errors(weight_OC - dequantize_weight(nearest, spec), moments_CC)
        if not error_O.sum() > 0:
            return nearest
        scale_OC, zero_OC = (per_weight(part, weight_OC, spec.group_size) for part in grid)
        weighed_CC = moments_CC * (weight_OC.numel() / error_O.sum())
        codes_OC = self._learn(weight_OC, scale_OC, zero_OC, weighed_CC, spec)
        learned = stored(codes_OC, grid, spec)
        better_O1 = (row_errors(weight_OC - dequantize_weight(learned, spec), moments_CC) < error_O)[:, None]
        return learned._replace(codes=torch.where(better_O1, learned.codes, nearest.codes))

    def _learn(
        self, weight_OC: Tensor, scale_OC: Tensor, zero_OC: Tensor, moments_CC: Tensor, spec: QuantSpec
    ) -> Tensor:
        """Codes as `affine` counts them, int16."""
        limits = code_range(spec.bits, spec.symmetric)
        how = (self.iterations, self.learning_rate, self.strength)
        soft_OC = learned(weight_OC, scale_OC, zero_OC, moments_CC, limits, *how)
        codes_OC = (weight_OC / scale_OC).floor_().add_(zero_OC)
        return codes_OC.add_(STRETCH * soft_OC.sigmoid() - SHIFT >= 0.5).clamp_(*limits).to(torch.int16)


def learned(
    weight_OC: Tensor,
    scale_OC: Tensor,
    zero_OC: Tensor,
    moments_CC: Tensor,
    limits: tuple[int, int],
    iterations: int,
    learning_rate: float,
    strength: float,
) -> Tensor:
    """The a of the formula after so many steps. strength 0: nothing drives h to 0 or 1."""
    low, high = limits
    down_OC = (weight_OC / scale_OC).floor()
    soft_OC = soft_inverse(weight_OC / scale_OC - down_OC)
    down_OC += zero_OC
    optimizer = torch.optim.Adam([soft_OC], lr=learning_rate)
    for step in range(iterations):
        sigmoid = soft_OC.sigmoid()
        h = (STRETCH * sigmoid - SHIFT).clamp_(0, 1)
        inside = (h > 0) & (h < 1)
        codes = down_OC + h
        free = (codes > low) & (codes < high)
        gradient = ((codes.clamp_(low, high) - zero_OC) * scale_OC - weight_OC) @ moments_CC
        gradient.mul_(2).mul_(scale_OC).mul_(free)
        progress = step / iterations
        if strength and progress >= WARM_UP:
            gradient.add_(pull_gradient(h, beta_at(progress)), alpha=strength)
        soft_OC.grad = gradient.mul_(inside).mul_(sigmoid * (1 - sigmoid)).mul_(STRETCH)
        optimizer.step()
    return soft_OC


def row_errors(error_OC: Tensor, moments_CC: Tensor) -> Tensor:
    """e H e^T of each row, [O]: the squared error of each output, summed over the observed inputs."""
    return ((error_OC @ moments_CC) * error_OC).sum(1)


def soft_inverse(fraction: Tensor, margin: float = 0.01) -> Tensor:
    """The a with h(a) = fraction, kept off the ends."""
    return torch.logit((fraction.clamp(margin, 1 - margin) + SHIFT) / STRETCH)


def beta_at(progress: float) -> float:
    """The exponent after this share of the steps, from WARM_UP on."""
    return BETAS[0] + (BETAS[1] - BETAS[0]) * (progress - WARM_UP) / (1 - WARM_UP)


def pull_gradient(h: Tensor, beta: float) -> Tensor:
    """Derivative of 1 - |2 h - 1|^beta."""
    centred = 2 * h - 1
    return -2 * beta * centred.abs().pow_(beta - 1).mul_(centred.sign())
