"""The backend of the C++ kernels: x86-64 with AVX512-VNNI or AMX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.quant.description.registry import BACKENDS
from viditq.quant.description.scheme import LayerScheme, QuantSpec
from viditq.quant.execution.backends.integer import IntegerBackend, scale_width
from viditq.quant.execution.backends.native import ops
from viditq.quant.execution.backends.native.layout import PADDED_TO, PANEL, PackedWeight, joined, pack_weight
from viditq.quant.execution.backends.one_input import (
    goes_into_the_quantizer,
    same_variants,
    share_codes,
    smoothing,
)
from viditq.quant.execution.surroundings import NOTHING_AFTER, NOTHING_BEFORE, After, Before
from viditq.quant.execution.variant import Variant
from viditq.quant.methods.quantizer import QuantizedWeight

BYTES_PER_SEGMENT = 5  # of an output: scale, zero point
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@BACKENDS.register("native")
class NativeBackend(IntegerBackend):
    """One fused operator a Linear. The kernels are built on first use: `check_available`, or the first `prepare`."""

    name = "native"
    fuses: ClassVar[bool] = True

    def check_available(self) -> None:
        ops.load()

    def weight_bytes(self, scheme: LayerScheme, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """In whole panels: codes, up to 4 bits two in a byte, for each output and segment a scale and a zero point."""
        if scheme.weight is None:
            return super().weight_bytes(scheme, out_features, in_features, dtype)
        size = scale_width(scheme, in_features)
        rows, width = PANEL * -(-out_features // PANEL), PADDED_TO * -(-size // PADDED_TO)
        codes = width // 2 if scheme.weight.bits <= 4 else width
        return rows * (in_features // size) * (codes + BYTES_PER_SEGMENT)

    def hold(self, quantized: QuantizedWeight, weight: QuantSpec, segment_size: int) -> PackedWeight:
        self.check_available()
        codes, scale, zero_point, _ = quantized
        if codes.device.type != "cpu":
            raise UserError(f"backend native runs on a CPU, not on {codes.device}; choose another one there, or fake")
        return pack_weight(codes, scale, zero_point, weight.bits, segment_size)

    def multiply(
        self, variant: Variant, x: Tensor, bias: Tensor | None, div: Tensor | None, addend: Tensor | None
    ) -> Tensor:
        spec, dtype = cast(QuantSpec, variant.scheme.activation), variant.dtype
        known = ops.fixed(_weight(variant), spec, variant.input_qparams, div)
        return ops.run(known, _readable(x), bias, NOTHING_BEFORE, NOTHING_AFTER, addend, dtype)

    def products(
        self,
        variants: Sequence[Variant],
        x: Tensor,
        biases: Sequence[Tensor | None],
        before: Before = NOTHING_BEFORE,
        after: After = NOTHING_AFTER,
    ) -> list[Tensor]:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._products(variants, x, biases, before, after)
        return self._products(variants, x, biases, before, after)

    def _products(
        self, variants: Sequence[Variant], x: Tensor, biases: Sequence[Tensor | None], before: Before, after: After
    ) -> list[Tensor]:
        if len(variants) == 1:
            return [self._product(variants[0], x, biases[0], before, after)]
        if share_codes(variants, _joins):
            known, bias, sizes = _joined(variants, biases)
            together = ops.run(known, _readable(x), bias, before, after, None, after.dtype or variants[0].dtype)
            return list(torch.split_with_sizes(together, sizes, -1))
        if after.is_nothing and _share_rows(variants):
            return ops.linears(
                _readable(x),
                [_weight(v) for v in variants],
                biases,
                cast(QuantSpec, variants[0].scheme.activation),
                [v.input_qparams for v in variants],
                [smoothing(v) for v in variants],
                layernorm_eps=before.eps,
                mul=before.mul,
                add=before.add,
                out_dtype=after.dtype or variants[0].dtype,
            )
        if not before.is_nothing and all(v.held is not None for v in variants):
            x, before = _transformed(x, before), NOTHING_BEFORE
        return [self._product(v, x, bias, before, after) for v, bias in zip(variants, biases, strict=True)]

    def _product(self, variant: Variant, x: Tensor, bias: Tensor | None, before: Before, after: After) -> Tensor:
        if variant.held is None:  # a segment in float
            return after.apply(self.linear(variant, before.apply(x), bias))
        (known, whole), addend = _alone(variant), None
        if not whole:
            y, addend = self.chained(variant, x if before.is_nothing else _transformed(x, before))
            x, before = y, NOTHING_BEFORE
        dtype = after.dtype or variant.dtype
        if addend is None:
            return ops.run(known, _readable(x), bias, before, after, None, dtype)
        # what a branch adds stays as it was computed
        return ops.run(known, _readable(x), bias, before, after, addend, variant.dtype).to(dtype)


def _share_rows(variants: Sequence[Variant]) -> bool:
    """Whether all quantize one and the same transformed input, each with smoothing and scales of its own."""
    first = variants[0]
    return all(
        v.held is not None
        and v.dtype == first.dtype
        and v.scheme.activation == first.scheme.activation
        and goes_into_the_quantizer(v)
        for v in variants
    )


def _readable(x: Tensor) -> Tensor:
    return x if x.dtype in FLOATS else x.float()


def _transformed(x: Tensor, before: Before) -> Tensor:
    return ops.transform(x, layernorm_eps=before.eps, mul=before.mul, add=before.add)


def _weight(variant: Variant) -> PackedWeight:
    assert isinstance(variant.held, PackedWeight)
    return variant.held


def _joins(variant: Variant, first: Variant) -> bool:
    return _weight(variant).joins(_weight(first))


def _alone(variant: Variant) -> tuple[ops.Fixed, bool]:
    """What no call of it changes, and whether its chain goes into the quantizer."""
    known: tuple[ops.Fixed, bool] | None = variant.derived.get("alone")
    weight = _weight(variant)
    if known is not None and known[0].weight[0] is weight.data:
        return known
    whole = goes_into_the_quantizer(variant)
    spec, div = cast(QuantSpec, variant.scheme.activation), smoothing(variant) if whole else None
    made = ops.fixed(weight, spec, variant.input_qparams, div), whole
    if not torch.compiler.is_compiling():
        variant.derived["alone"] = made
    return made


def _joined(variants: Sequence[Variant], biases: Sequence[Tensor | None]) -> tuple[ops.Fixed, Tensor | None, list[int]]:
    """One weight of all of them, of which each one's is a part from then on, their biases one after another, sizes."""
    first = variants[0]
    known = first.derived.get("joined")
    if known is not None and same_variants(known[0], variants):
        return known[1]
    weight = joined([_weight(v) for v in variants])
    rows = 0
    for v in variants:
        mine = slice(rows, rows + len(_weight(v).data))
        counts = None if weight.zero_point is None else weight.zero_point[mine]
        v.hand_over(_weight(v)._replace(data=weight.data[mine], scale=weight.scale[mine], zero_point=counts))
        v.derived.pop("alone", None)
        rows = mine.stop
    sizes = [_weight(v).out_features for v in variants]
    parts = [torch.zeros(n) if b is None else b.detach().float() for b, n in zip(biases, sizes, strict=True)]
    bias = None if all(b is None for b in biases) else torch.cat(parts)
    together = ops.fixed(weight, cast(QuantSpec, first.scheme.activation), first.input_qparams, smoothing(first))
    first.derived["joined"] = (list(variants), (together, bias, sizes))
    return together, bias, sizes
