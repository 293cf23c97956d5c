"""Rotation by a randomised Hadamard (QuaRot; in ViDiT-Q after channel scales): X' = X H, W' = W H.

H = diag(signs) Hadamard / sqrt(n), orthogonal, so X' W'^T = X W^T. The signs are always random: a plain Hadamard would
gather the mean of all channels in its first column. Legend: O out_features, C in_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.quant.description.fields import is_int
from viditq.quant.description.registry import TRANSFORMS
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.description.specs import TransformSpec
from viditq.quant.methods.transforms.base import Transform
from viditq.quant.numerics.hadamard import random_signs, rotate


class Rotate(Transform):
    """x H online, w H once; signs int8 [C] are stored, so that a file does not depend on torch's random numbers."""

    signs: Tensor

    def __init__(self, signs_C: Tensor) -> None:
        super().__init__()
        self.register_buffer("signs", signs_C)

    def activation(self, x: Tensor) -> Tensor:
        return rotate(x if x.dtype == torch.float64 else x.float(), self.signs)

    def weight(self, weight_OC: Tensor) -> Tensor:
        return rotate(weight_OC, self.signs)

    def bounds(self, minimum_C: Tensor, maximum_C: Tensor) -> None:
        """None: the extremes of a mixture of channels do not follow from theirs."""


@TRANSFORMS.register("rotate")
@dataclass(frozen=True)
class RotateSpec(TransformSpec):
    """Describes a Rotate. seed: of the random signs; layers of equal width have the same ones."""

    name: ClassVar[str] = "rotate"

    seed: int = 0

    def __post_init__(self) -> None:
        if not is_int(self.seed) or not 0 <= self.seed < 2**31:
            raise UserError(f"seed={self.seed!r} is not possible: give a whole number from 0 to {2**31 - 1}")

    def fit(self, weight_OC: Tensor, stats: Any, scheme: LayerScheme) -> Rotate:
        return Rotate(random_signs(weight_OC.shape[1], self.seed).to(weight_OC.device))

    def empty(self, in_features: int) -> Rotate:
        return Rotate(torch.empty(in_features, dtype=torch.int8, device="meta"))
