"""Invertible maps on the in-features axis that leave linear(T(x), T^-T(w)) as it was.

Legend: O out_features, C in_features.
"""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn


class Transform(nn.Module):
    """One map; its tensors are buffers and travel with the artifact."""

    def activation(self, x: Tensor) -> Tensor:
        """[..., C] -> a new tensor [..., C]; never writes to `x`."""
        raise NotImplementedError

    def weight(self, weight_OC: Tensor) -> Tensor:
        """[O, C] -> [O, C]."""
        raise NotImplementedError

    def bounds(self, minimum_C: Tensor, maximum_C: Tensor) -> tuple[Tensor, Tensor] | None:
        """Per-channel extremes of `activation(x)` given those of x; None where they do not follow from them."""
        raise NotImplementedError


class Chain(nn.ModuleList):
    """Transforms applied in order; empty = identity."""

    def __init__(self, transforms: Sequence[Transform] = ()) -> None:
        super().__init__(transforms)

    def activation(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]; `x` itself when the chain is empty."""
        for transform in self:
            x = cast(Transform, transform).activation(x)
        return x

    def weight(self, weight_OC: Tensor) -> Tensor:
        """[O, C] -> [O, C]."""
        for transform in self:
            weight_OC = cast(Transform, transform).weight(weight_OC)
        return weight_OC

    def moments(self, moments_CC: Tensor) -> Tensor:
        """X'^T X' of the chain's outputs X' given X^T X of its inputs: M^T H M with X' = X M; itself when empty."""
        if not len(self):
            return moments_CC
        return self.activation(self.activation(moments_CC).T.contiguous())

    def bounds(self, minimum_C: Tensor, maximum_C: Tensor) -> tuple[Tensor, Tensor] | None:
        """Per-channel extremes of `activation(x)` given those of x; None where they do not follow from them."""
        bounds: tuple[Tensor, Tensor] | None = (minimum_C, maximum_C)
        for transform in self:
            if bounds is not None:
                bounds = cast(Transform, transform).bounds(*bounds)
        return bounds
