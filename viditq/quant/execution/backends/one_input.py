"""What of Linears that read one input can be computed once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from viditq.quant.execution.variant import Variant
from viditq.quant.methods.transforms import Smooth


def goes_into_the_quantizer(variant: Variant) -> bool:
    """Whether all that its chain does is a division; a rotation and a low-rank branch need the tensor itself."""
    smooth_at_most = all(isinstance(transform, Smooth) for transform in variant.chain) and len(variant.chain) <= 1
    return smooth_at_most and variant.low_rank_up is None


def smoothing(variant: Variant) -> Tensor | None:
    """The divisor of a variant that `goes_into_the_quantizer`."""
    return variant.chain[0].scale if len(variant.chain) else None  # type: ignore[return-value]


def share_codes(variants: Sequence[Variant], fits: Callable[[Variant, Variant], bool]) -> bool:
    """Whether one quantized input serves all of them; fits: what the layouts of their weights have to agree in."""
    first = variants[0]
    known: tuple[Any, bool] | None = first.derived.get("shared")
    if known is not None and same_variants(known[0], variants):
        return known[1]
    if torch.compiler.is_compiling():  # comparing tensors would break the graph; what was called before is known
        return False
    answer = all(v.held is not None and goes_into_the_quantizer(v) for v in variants) and all(
        v.scheme.activation == first.scheme.activation
        and fits(v, first)
        and _equal(smoothing(v), smoothing(first))
        and _equal(v.input_scale, first.input_scale)
        and (v.input_scale is None or _equal(v.input_zero_point, first.input_zero_point))
        for v in variants
    )
    first.derived["shared"] = (list(variants), answer)
    return answer


def same_variants(known: Sequence[Variant], variants: Sequence[Variant]) -> bool:
    """Whether these are the very same ones."""
    return list(known) == list(variants)  # modules are equal to themselves alone


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))
