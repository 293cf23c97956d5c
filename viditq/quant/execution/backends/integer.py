"""What backends that multiply in integers have in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from viditq.quant.description.scheme import LayerScheme, QuantSpec
from viditq.quant.execution.backends.base import Backend
from viditq.quant.execution.variant import HeldWeight, Variant
from viditq.quant.methods.quantizer import QuantizedWeight
from viditq.quant.methods.transforms import Smooth

LARGEST_SUM = 2**31 // 255**2  # products of differences from the zero points that an int32 holds


class IntegerBackend(Backend):
    """Codes equal those of `fake`, sums of their products are exact; what is left to rounding is the dequantization."""

    def __init__(self) -> None:
        self._last: HeldWeight | None = None

    def unsupported_field(self, scheme: LayerScheme) -> str | None:
        if scheme.weight is None and scheme.activation is None:
            return None  # a segment that stays in float
        if scheme.weight is None:
            return "weight"
        if scheme.activation is None:
            return "activation"
        for side, spec in (("weight", scheme.weight), ("activation", scheme.activation)):
            if spec.is_float:
                return f"{side}.number"
        if scheme.activation.full_range:
            return "activation.full_range"
        return "activation.granularity" if scheme.activation.granularity == "channel" else None

    @abstractmethod
    def hold(self, quantized: QuantizedWeight, weight: QuantSpec, segment_size: int) -> HeldWeight:
        """The weight in the layout that `multiply` reads. segment_size: in-features that share all scales."""

    @abstractmethod
    def multiply(
        self, variant: Variant, x: Tensor, bias: Tensor | None, div: Tensor | None, addend: Tensor | None
    ) -> Tensor:
        """Q_a(x / div) Q_w^T + bias + addend in the variant's dtype; x [..., C], addend [..., O] in that dtype."""

    def prepare(self, variant: Variant) -> None:
        quantized, scheme = variant.quantized_weight(), variant.scheme
        if quantized is None:
            return
        assert scheme.weight is not None
        held = self.hold(quantized, scheme.weight, summable(scale_width(scheme, variant.in_features)))
        if self._last is not None and _same(held, self._last):  # segments that differ in their activation alone
            held = self._last
        self._last = held
        variant.hand_over(held)

    @torch.no_grad()
    def linear(self, variant: Variant, x: Tensor, bias: Tensor | None) -> Tensor:
        chain = variant.chain
        if variant.held is None:
            return F.linear(chain.activation(x).to(variant.dtype), cast(Tensor, variant.weight), bias)
        if variant.low_rank_up is None and len(chain) == 1 and isinstance(chain[0], Smooth):
            return self.multiply(variant, x, bias, chain[0].scale, None)
        x, addend = self.chained(variant, x)
        return self.multiply(variant, x, bias, None, addend)

    @staticmethod
    def chained(variant: Variant, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The chain's output, and what the low-rank branch adds to the product; None without one."""
        x = variant.chain.activation(x)
        if variant.low_rank_up is None:
            return x, None
        return x, F.linear(F.linear(x.to(variant.dtype), variant.low_rank_down), variant.low_rank_up)


def scale_width(scheme: LayerScheme, in_features: int) -> int:
    """In-features that share the scales of weight and activation."""
    return math.gcd(
        *(spec.group_size or in_features for spec in (scheme.weight, scheme.activation) if spec is not None)
    )


def stored_grid(
    scale_OS: Tensor, counts_OS: Tensor | None, shift: int, spec: QuantSpec, in_features: int
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point as they are stored, from those of S segments; counts: zero points less `shift`, None = 0."""
    groups = 1 if spec.group_size is None else in_features // spec.group_size
    rows = slice(1 if spec.granularity == "tensor" else None)

    def stored(values_OS: Tensor) -> Tensor:
        values_OG = values_OS[rows, :: values_OS.shape[1] // groups]
        return (values_OG if spec.group_size is None else values_OG.unsqueeze(-1)).contiguous()

    if spec.symmetric:
        return stored(scale_OS), None
    counts_OS = torch.zeros_like(scale_OS) if counts_OS is None else counts_OS
    return stored(scale_OS), stored((counts_OS.to(torch.int16) + shift).to(torch.uint8))


def summable(size: int) -> int:
    """The largest divisor of `size` in-features whose exact sum cannot overflow an int32."""
    return next(size // parts for parts in range(1, size + 1) if size % parts == 0 and size // parts <= LARGEST_SUM)


def _same(first: HeldWeight, second: HeldWeight) -> bool:
    """Whether two held weights (tuples of tensors and numbers) are equal."""
    if type(first) is not type(second):
        return False
    pairs = list(zip(cast(tuple[Any, ...], first), cast(tuple[Any, ...], second), strict=True))
    return all(
        a.shape == b.shape and torch.equal(a, b)
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else a is b or a == b
        for a, b in pairs
    )
