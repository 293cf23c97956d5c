"""What backends have in common that quantize rows in one operator and multiply them in another."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from viditq.quant.execution.backends.integer import IntegerBackend
from viditq.quant.execution.backends.one_input import goes_into_the_quantizer, share_codes, smoothing
from viditq.quant.execution.surroundings import NOTHING_AFTER, NOTHING_BEFORE, After, Before
from viditq.quant.execution.variant import Variant
from viditq.quant.methods.quantizer import Grid, range_grid
from viditq.quant.numerics import granularity


class FusingBackend(IntegerBackend):
    """What stands before a product goes into its quantizer, what stands behind it into the product; Linears that read
    one input and are smoothed alike share its codes.
    """

    fuses: ClassVar[bool] = True

    @abstractmethod
    def quantized(self, variant: Variant, x: Tensor, before: Before, div: Tensor | None) -> Any:
        """Codes of before(x) / div, as `product` takes them."""

    @abstractmethod
    def product(
        self,
        variant: Variant,
        quantized: Any,
        x: Tensor,
        bias: Tensor | None,
        after: After = NOTHING_AFTER,
        addend: Tensor | None = None,
    ) -> Tensor:
        """after(quantized weight^T + bias + addend) in `after.dtype`, else the variant's; leading axes as `x` has."""

    @staticmethod
    @abstractmethod
    def same_cut(variant: Variant, first: Variant) -> bool:
        """Whether codes made for the one are laid out as the other reads them."""

    def multiply(
        self, variant: Variant, x: Tensor, bias: Tensor | None, div: Tensor | None, addend: Tensor | None
    ) -> Tensor:
        return self.product(variant, self.quantized(variant, x, NOTHING_BEFORE, div), x, bias, addend=addend)

    @torch.no_grad()
    def products(
        self,
        variants: Sequence[Variant],
        x: Tensor,
        biases: Sequence[Tensor | None],
        before: Before = NOTHING_BEFORE,
        after: After = NOTHING_AFTER,
    ) -> list[Tensor]:
        shared = None
        if len(variants) > 1 and share_codes(variants, self.same_cut):
            shared = self.quantized(variants[0], x, before, smoothing(variants[0]))
        outs = []
        for variant, bias in zip(variants, biases, strict=True):
            if variant.held is None:  # a segment in float
                outs.append(after.apply(self.linear(variant, before.apply(x), bias)))
            elif goes_into_the_quantizer(variant):
                quantized = shared or self.quantized(variant, x, before, smoothing(variant))
                outs.append(self.product(variant, quantized, x, bias, after))
            else:
                y, addend = self.chained(variant, x if before.is_nothing else before.apply(x.float()))
                quantized = self.quantized(variant, y, NOTHING_BEFORE, None)
                outs.append(self.product(variant, quantized, x, bias, after, addend))
        return outs


def ranged(
    variant: Variant, x: Tensor, before: Before, div: Tensor | None
) -> tuple[Tensor, Before, Tensor | None, Grid | None]:
    """What is left for a quantizer of rows, and the grid that rows do not find themselves; None = they do.

    Where all rows of a sample share a range it has to be known before the first of them is quantized.
    """
    spec, grid = variant.scheme.activation, variant.input_qparams
    assert spec is not None
    if spec.granularity != "tensor" or not spec.dynamic or not x.numel():
        return x, before, div, grid
    x = before.apply(x.float())
    x = x if div is None else x / div
    return x, NOTHING_BEFORE, None, range_grid(*granularity.activation_range(x, spec.granularity, None), spec)
