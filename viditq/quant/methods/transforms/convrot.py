"""Rotation of groups of inputs by a regular Hadamard matrix (ConvRot): X' = X H, W' = W H, H its own inverse.

The same matrices that ComfyUI's files with `convrot` are made for, so that codes behind it travel as they are.
Legend: O out_features, C in_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.quant.description.registry import TRANSFORMS
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.description.specs import TransformSpec
from viditq.quant.methods.transforms.base import Transform
from viditq.quant.numerics.regular_hadamard import rotate_groups

GROUP_SIZES = (256, 64, 16)


class ConvRot(Transform):
    """x H online, w H once, each group of `group_size` inputs by itself; nothing is stored."""

    def __init__(self, group_size: int) -> None:
        super().__init__()
        self.group_size = group_size

    def activation(self, x: Tensor) -> Tensor:
        return rotate_groups(x if x.dtype == torch.float64 else x.float(), self.group_size)

    def weight(self, weight_OC: Tensor) -> Tensor:
        return rotate_groups(weight_OC, self.group_size)

    def bounds(self, minimum_C: Tensor, maximum_C: Tensor) -> None:
        """None: the extremes of a mixture of channels do not follow from theirs."""


@TRANSFORMS.register("convrot")
@dataclass(frozen=True)
class ConvRotSpec(TransformSpec):
    """Describes a ConvRot. group_size: 256, 64 or 16, or auto = per layer, the largest that divides its inputs."""

    name: ClassVar[str] = "convrot"

    group_size: int | str = "auto"

    def __post_init__(self) -> None:
        if self.group_size != "auto" and (isinstance(self.group_size, bool) or self.group_size not in GROUP_SIZES):
            raise UserError(f"group_size={self.group_size!r} is not possible: give 16, 64, 256 or auto")

    def check(self, layer: str, in_features: int) -> None:
        if not any(in_features % size == 0 for size in self._sizes):
            allowed = " or ".join(str(size) for size in self._sizes)
            raise UserError(
                f"convrot cannot rotate {layer}: its {in_features} inputs do not divide into groups of {allowed}; "
                "choose another group_size, or leave it in float by a rule (keep_float)"
            )

    def group_of(self, in_features: int) -> int:
        """The group size of a Linear that passed `check`."""
        return next(size for size in self._sizes if in_features % size == 0)

    @property
    def _sizes(self) -> tuple[int, ...]:
        return (self.group_size,) if isinstance(self.group_size, int) else GROUP_SIZES

    def fit(self, weight_OC: Tensor, stats: Any, scheme: LayerScheme) -> ConvRot:
        return ConvRot(self.group_of(weight_OC.shape[1]))

    def empty(self, in_features: int) -> ConvRot:
        return ConvRot(self.group_of(in_features))
