"""The fused Linear as one operator of torch: `torch.ops.viditq.linear`, whole under torch.compile(fullgraph=True)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from viditq.quant.description.scheme import QuantSpec
from viditq.quant.execution.backends.native import build
from viditq.quant.execution.backends.native.layout import PackedWeight
from viditq.quant.execution.surroundings import ACTIVATIONS, After, Before

Activation = Literal["none", "gelu_tanh", "gelu", "silu"]
_registered = False


def load() -> None:
    """Builds and loads the kernels and tells torch.compile the shapes; raises build.Unavailable."""
    global _registered
    build.load()
    if not _registered:
        torch.library.register_fake("viditq::linear", _fake_linear)
        torch.library.register_fake("viditq::linears", _fake_linears)
        torch.library.register_fake("viditq::transform", lambda x, *rest: torch.empty_like(x, dtype=torch.float32))
        _registered = True


def _fake_linear(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    out_features, out_dtype = rest[3], rest[-1]
    return x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype)


def _fake_linears(x: Tensor, weights: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], out_features), dtype=rest[-1]) for out_features in rest[3]]


class Fixed(NamedTuple):
    """What calls of one Linear have in common, in the order in which the operator takes it: weight to grid."""

    weight: tuple[Tensor, Tensor, Tensor | None]
    out_features: int
    grid: tuple[Any, ...]
    """Bits, symmetric, ranges of a row, one range for all rows of a sample; scale and zero point if static."""
    div: Tensor | None


def fixed(
    weight: PackedWeight, spec: QuantSpec, static: tuple[Tensor, Tensor] | None = None, div: Tensor | None = None
) -> Fixed:
    """Arguments as of `linear`."""
    scale, zero_point = static or (None, None)
    grid = (*_grid(spec, weight), _as(scale), _as(zero_point))
    return Fixed((weight.data, weight.scale, weight.zero_point), weight.out_features, grid, _as(div))


def linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    spec: QuantSpec,
    static: tuple[Tensor, Tensor] | None = None,
    *,
    layernorm_eps: float | None = None,
    mul: Tensor | None = None,
    add: Tensor | None = None,
    div: Tensor | None = None,
    addend: Tensor | None = None,
    activation: Activation = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """residual + gate * activation(Q_a(t) Q_w^T + bias + addend), t = (layernorm(x) * mul + add) / div.

    Every part that is None is left out.
    Computed in float32 around exact integer sums; only the end is rounded to `out_dtype` (None = that of x).
    Legend: [..., C] inputs, [..., O] outputs, M rows (product of the leading axes), R divides M: row m takes line
    m // (M / R), so R = 1 is for all rows and R = B one for each leading element.

    x: [..., C], float32, bfloat16 or float16. bias: [O]. spec: of the activation, as `fake` honours it;
    granularity token, tensor or group (not channel). static: scale and zero point, float32, of a static spec.
    layernorm_eps: LayerNorm over C without weight and bias (fold those into mul and add); None = none.
    mul, add: [R, C] or with axes of 1 between. div: [C], the smoothing scale. addend, residual: [..., O]. gate: [R, O].
    Those are best contiguous, and float32 but addend and residual, which are in out_dtype: they are copied otherwise.
    There is no gradient. Raises RuntimeError for shapes that do not fit.
    """
    before, after = Before(layernorm_eps, mul, add), After(activation, gate, residual)
    return run(fixed(weight, spec, static, div), x, bias, before, after, addend, out_dtype or x.dtype)


def run(
    linear: Fixed,
    x: Tensor,
    bias: Tensor | None,
    before: Before,
    after: After,
    addend: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`linear`, of which much is known already."""
    return torch.ops.viditq.linear.default(
        x,
        *linear.weight,
        _as(bias),
        linear.out_features,
        *linear.grid,
        -1.0 if before.eps is None else before.eps,
        _as(before.mul),
        _as(before.add),
        linear.div,
        _as(addend, dtype),
        ACTIVATIONS.index(after.activation),
        _as(after.gate),
        _as(after.residual, dtype),
        dtype,
    )


def linears(
    x: Tensor,
    weights: Sequence[PackedWeight],
    biases: Sequence[Tensor | None],
    spec: QuantSpec,
    statics: Sequence[tuple[Tensor, Tensor] | None],
    divs: Sequence[Tensor | None],
    *,
    layernorm_eps: float | None = None,
    mul: Tensor | None = None,
    add: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Q_a(t / div) Q_w^T + bias of each Linear, t = layernorm(x) * mul + add, which is computed once for all of them.

    To the bit what `linear` gives one by one; arguments as there, of each Linear its weight, bias, static grid and div.
    """
    scales, zero_points = zip(*(static or (None, None) for static in statics), strict=True)
    return torch.ops.viditq.linears(
        x,
        [weight.data for weight in weights],
        [weight.scale for weight in weights],
        [weight.zero_point for weight in weights],
        [_as(bias) for bias in biases],
        [weight.out_features for weight in weights],
        *_grid(spec, weights[0]),
        [_as(scale) for scale in scales],
        [_as(zero_point) for zero_point in zero_points],
        -1.0 if layernorm_eps is None else layernorm_eps,
        _as(mul),
        _as(add),
        [_as(div) for div in divs],
        out_dtype or x.dtype,
    )


def transform(
    x: Tensor,
    *,
    layernorm_eps: float | None = None,
    mul: Tensor | None = None,
    add: Tensor | None = None,
    div: Tensor | None = None,
) -> Tensor:
    """(layernorm(x) * mul + add) / div, float32 [..., C]: the t of `linear`, for a rotation or a branch."""
    return torch.ops.viditq.transform(x, -1.0 if layernorm_eps is None else layernorm_eps, _as(mul), _as(add), _as(div))


def _grid(spec: QuantSpec, weight: PackedWeight) -> tuple[int, bool, int, bool]:
    """Bits, symmetric, ranges of a row, one range for all rows of a sample."""
    groups = 1 if spec.group_size is None else weight.in_features // spec.group_size
    return spec.bits, spec.symmetric, groups, spec.granularity == "tensor" and spec.dynamic


def _as(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    if tensor is None or (tensor.dtype == dtype and tensor.is_contiguous()):  # calls of torch that change nothing cost
        return tensor
    return tensor.to(dtype).contiguous()
