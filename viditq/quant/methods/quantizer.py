"""QuantSpec applied to tensors: the one place where granularity, grid and storage of codes meet."""

from typing import NamedTuple

import torch
from torch import Tensor

from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.specs import RangeSpec
from viditq.quant.numerics import affine, float_grid, granularity

Grid = tuple[Tensor, Tensor]
"""Scale and zero point; of floating-point numbers the scale and that of the whole tensor (1 where it has none)."""


class QuantizedActivation(NamedTuple):
    """codes uint8 [..., C] (signed ones shifted by 2^(b-1)); scale and zero point (shifted alike) float32 [..., R].

    R ranges a row: 1, or its groups. Where `fake` would give NaN the scale is NaN.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor


class QuantizedWeight(NamedTuple):
    """codes uint8 [O, C] (signed ones shifted by 2^(b-1)); scale float32; zero_point uint8, None if symmetric.

    scale and zero_point: tensor [1, 1], channel [O, 1], group [O, G, 1]. Of floating-point numbers codes are their bit
    patterns; with a `block_scale` scale is uint8, that number's bit pattern, and tensor_scale float32 [1, 1, 1] where
    there is one of the whole tensor.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    tensor_scale: Tensor | None = None


def _shift(spec: QuantSpec) -> int:
    return 2 ** (spec.bits - 1) if spec.symmetric else 0


def range_grid(lo: Tensor, hi: Tensor, spec: QuantSpec, tensor_amax: Tensor | None = None) -> Grid:
    """Of values between lo and hi, in their shape. tensor_amax: of the whole tensor; None = it is all of these."""
    if not spec.is_float:
        return affine.compute_qparams(lo, hi, spec.bits, spec.symmetric)
    amax = torch.maximum(-lo, hi)
    if spec.block_scale == "e4m3":
        return float_grid.two_level_scale(amax, amax.amax() if tensor_amax is None else tensor_amax, spec.number)
    scale = float_grid.power_scale if spec.block_scale == "e8m0" else float_grid.float_scale
    return scale(amax, spec.number), amax.new_ones(())


def weight_grid(weight_OC: Tensor, spec: QuantSpec, ranges: RangeSpec) -> Grid:
    """Scale and zero point of a weight, float32, in the shapes of `QuantizedWeight`."""
    sets = granularity.weight_sets(weight_OC.detach().float(), spec.granularity, spec.group_size)
    shape = granularity.weight_grid_shape(weight_OC, spec.granularity, spec.group_size)
    scale, zero_point = ranges.fit(sets, spec)
    return scale.view(shape), zero_point if spec.is_float else zero_point.view(shape)


def min_max_grid(weight_OC: Tensor, spec: QuantSpec) -> Grid:
    """The same from the extremes; also on the meta device."""
    return range_grid(*granularity.weight_range(weight_OC.detach().float(), spec.granularity, spec.group_size), spec)


def quantize_weight(weight_OC: Tensor, spec: QuantSpec, grid: Grid | None = None) -> QuantizedWeight:
    """Nearest rounding on `grid` (None = min-max), float32 arithmetic."""
    weight_OC = weight_OC.detach().float()
    scale, zero_point = min_max_grid(weight_OC, spec) if grid is None else grid
    view = granularity.to_groups(weight_OC, spec.group_size)
    if spec.is_float:
        codes = float_grid.codes_of(float_grid.rounded(view / scale, spec.number), spec.number)
        return _stored_float(codes.view(weight_OC.shape), (scale, zero_point), spec)
    codes = affine.float_codes(view, scale, zero_point, spec.bits, spec.symmetric)
    return stored(codes.view(weight_OC.shape), (scale, zero_point), spec)


def stored(codes_OC: Tensor, grid: Grid, spec: QuantSpec) -> QuantizedWeight:
    """Codes as `affine` counts them (signed where symmetric) and their grid, in the types that are stored."""
    zero_point = None if spec.symmetric else grid[1].to(torch.uint8)
    shifted_OC = codes_OC + _shift(spec) if spec.symmetric else codes_OC
    return QuantizedWeight(shifted_OC.to(torch.uint8), grid[0], zero_point)


def _stored_float(codes_OC: Tensor, grid: Grid, spec: QuantSpec) -> QuantizedWeight:
    scale, tensor_scale = grid[0], grid[1].view(1, 1, 1) if spec.block_scale == "e4m3" else None
    if spec.block_scale is not None:
        scale = float_grid.stored_scale(scale, spec.block_scale, tensor_scale)
    return QuantizedWeight(codes_OC, scale, None, tensor_scale)


def dequantize_weight(quantized: QuantizedWeight, spec: QuantSpec) -> Tensor:
    """float32 [O, C]."""
    view = granularity.to_groups(quantized.codes, spec.group_size)
    if spec.is_float:
        scale = quantized.scale
        if spec.block_scale is not None:
            scale = float_grid.loaded_scale(scale, spec.block_scale, quantized.tensor_scale)
        return (float_grid.values_of(view, spec.number) * scale).view(quantized.codes.shape)
    zero_point = quantized.zero_point
    offset = torch.tensor(float(_shift(spec)), device=view.device) if zero_point is None else zero_point.float()
    return affine.dequantize(view, quantized.scale.float(), offset).view(quantized.codes.shape)


def static_qparams(minimum_C: Tensor, maximum_C: Tensor, spec: QuantSpec) -> Grid:
    """float32 scale and zero point of a static activation from its per-channel extremes."""
    bounds = granularity.calibrated_range(minimum_C.float(), maximum_C.float(), spec.granularity, spec.group_size)
    return range_grid(*bounds, spec)


def fake_quantize_activation(x: Tensor, spec: QuantSpec, static: Grid | None, inplace: bool = False) -> Tensor:
    """`x` [..., C] on the grid of `spec`, computed in float32 and returned as float32.

    static: (scale, zero_point) unless the spec is dynamic. inplace: `x` may be overwritten.
    """
    if x.dtype != torch.float32:
        x, inplace = x.float(), True
    view = granularity.to_groups(x, spec.group_size)
    if spec.is_float:
        return _on_float_grid(x, view, spec, static)
    if static is not None:
        scale, zero_point = static
        return affine.fake_quantize(view, scale, zero_point, spec.bits, spec.symmetric, inplace).view(x.shape)
    lo, hi = granularity.activation_range(x, spec.granularity, spec.group_size)
    y = affine.fake_quantize_own_range(view, lo, hi, spec.bits, spec.symmetric, inplace, spec.full_range)
    return y.view(x.shape)


def _on_float_grid(x: Tensor, view: Tensor, spec: QuantSpec, static: Grid | None) -> Tensor:
    scale = _float_scale(x, view, spec) if static is None else static[0]
    return (float_grid.rounded(view / scale, spec.number) * scale).view(x.shape)


def _float_scale(x: Tensor, view: Tensor, spec: QuantSpec) -> Tensor:
    of_sample = None
    if spec.block_scale == "e4m3":  # not of the batch: a sample must not depend on its batch mates
        of_sample = x.abs().flatten(1).amax(1) if x.ndim > 1 else x.abs().amax(0, True)
        of_sample = of_sample.view(-1, *[1] * (view.ndim - 1))
    return range_grid(*granularity.activation_range(x, spec.granularity, spec.group_size), spec, of_sample)[0]


def narrow_activation(x: Tensor, spec: QuantSpec, static: Grid | None) -> tuple[Tensor, Tensor]:
    """The numbers behind `fake_quantize_activation` in torch's type of 8 bits, and their scale; same arguments.

    Of formats without groups. scale: float32, 1 for a row, for a sample or for all: it broadcasts against `x`.
    """
    x = x.float()
    scale = _float_scale(x, x, spec) if static is None else static[0]
    return float_grid.narrowed(x / scale, spec.number), scale


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
