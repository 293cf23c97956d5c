"""QuantSpec applied to tensors: the one place where granularity, grid and storage of codes meet."""

from typing import NamedTuple

import torch
from torch import Tensor

from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.specs import RangeSpec
from viditq.quant.numerics import affine, granularity

Grid = tuple[Tensor, Tensor]


class QuantizedActivation(NamedTuple):
    """codes uint8 [..., C] (signed ones shifted by 2^(b-1)); scale and zero point (shifted alike) float32 [..., R].

    R ranges a row: 1, or its groups. Where `fake` would give NaN the scale is NaN.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor


class QuantizedWeight(NamedTuple):
    """codes uint8 [O, C] (signed ones shifted by 2^(b-1)); scale float32; zero_point uint8, None if symmetric.

    scale and zero_point: tensor [1, 1], channel [O, 1], group [O, G, 1].
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None


def _shift(spec: QuantSpec) -> int:
    return 2 ** (spec.bits - 1) if spec.symmetric else 0


def weight_grid(weight_OC: Tensor, spec: QuantSpec, ranges: RangeSpec) -> Grid:
    """Scale and zero point of a weight, float32, in the shapes of `QuantizedWeight`."""
    sets = granularity.weight_sets(weight_OC.detach().float(), spec.granularity, spec.group_size)
    shape = granularity.weight_grid_shape(weight_OC, spec.granularity, spec.group_size)
    scale, zero_point = ranges.fit(sets, spec)
    return scale.view(shape), zero_point.view(shape)


def min_max_grid(weight_OC: Tensor, spec: QuantSpec) -> Grid:
    """The same from the extremes; also on the meta device."""
    lo, hi = granularity.weight_range(weight_OC.detach().float(), spec.granularity, spec.group_size)
    return affine.compute_qparams(lo, hi, spec.bits, spec.symmetric)


def quantize_weight(weight_OC: Tensor, spec: QuantSpec, grid: Grid | None = None) -> QuantizedWeight:
    """Nearest rounding on `grid` (None = min-max), float32 arithmetic."""
    weight_OC = weight_OC.detach().float()
    scale, zero_point = min_max_grid(weight_OC, spec) if grid is None else grid
    view = granularity.to_groups(weight_OC, spec.group_size)
    codes = affine.float_codes(view, scale, zero_point, spec.bits, spec.symmetric)
    return stored(codes.view(weight_OC.shape), (scale, zero_point), spec)


def stored(codes_OC: Tensor, grid: Grid, spec: QuantSpec) -> QuantizedWeight:
    """Codes as `affine` counts them (signed where symmetric) and their grid, in the types that are stored."""
    zero_point = None if spec.symmetric else grid[1].to(torch.uint8)
    shifted_OC = codes_OC + _shift(spec) if spec.symmetric else codes_OC
    return QuantizedWeight(shifted_OC.to(torch.uint8), grid[0], zero_point)


def dequantize_weight(quantized: QuantizedWeight, spec: QuantSpec) -> Tensor:
    """float32 [O, C]."""
    view = granularity.to_groups(quantized.codes, spec.group_size)
    zero_point = quantized.zero_point
    offset = torch.tensor(float(_shift(spec)), device=view.device) if zero_point is None else zero_point.float()
    return affine.dequantize(view, quantized.scale.float(), offset).view(quantized.codes.shape)


def static_qparams(minimum_C: Tensor, maximum_C: Tensor, spec: QuantSpec) -> Grid:
    """float32 scale and zero point of a static activation from its per-channel extremes."""
    lo, hi = granularity.calibrated_range(minimum_C.float(), maximum_C.float(), spec.granularity, spec.group_size)
    return affine.compute_qparams(lo, hi, spec.bits, spec.symmetric)


def fake_quantize_activation(x: Tensor, spec: QuantSpec, static: Grid | None, inplace: bool = False) -> Tensor:
    """`x` [..., C] on the grid of `spec`, computed in float32 and returned as float32.

    static: (scale, zero_point) unless the spec is dynamic. inplace: `x` may be overwritten.
    """
    if x.dtype != torch.float32:
        x, inplace = x.float(), True
    view = granularity.to_groups(x, spec.group_size)
    if static is not None:
        scale, zero_point = static
        return affine.fake_quantize(view, scale, zero_point, spec.bits, spec.symmetric, inplace).view(x.shape)
    lo, hi = granularity.activation_range(x, spec.granularity, spec.group_size)
    y = affine.fake_quantize_own_range(view, lo, hi, spec.bits, spec.symmetric, inplace, spec.full_range)
    return y.view(x.shape)


def quantize_activation(x: Tensor, spec: QuantSpec, static: Grid | None) -> QuantizedActivation:
    """The codes behind `fake_quantize_activation`; same arguments."""
    x = x.float()
    view = granularity.to_groups(x, spec.group_size)
    if static is None:
        lo, hi = granularity.activation_range(x, spec.granularity, spec.group_size)
        static = affine.compute_qparams(lo, hi, spec.bits, spec.symmetric, spec.full_range)
    scale, zero_point = static
    codes = affine.quantize(view, scale, zero_point, spec.bits, spec.symmetric, spec.full_range)
    codes = codes.add_(_shift(spec)).to(torch.uint8)
    undefined = view.isnan().any(-1, True) | ~scale.isfinite()
    scale = torch.where(undefined, torch.nan, scale)
    zero_point = (zero_point + _shift(spec)).expand_as(scale)
    rows = (*x.shape[:-1], -1)
    return QuantizedActivation(codes.view(x.shape), scale.reshape(rows), zero_point.reshape(rows))
