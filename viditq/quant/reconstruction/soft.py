"""A quantized Linear that gradients go through: soft roundings of the weight, straight-through activations.

w^ = s (clamp(floor(w / s) + z + h(a)) - z), h(a) = clip(1.2 sigmoid(a) - 0.1, 0, 1). An activation is quantized as in
the forward of a QuantLinear; its gradient is that of the identity where nothing is clipped and 0 where something is.

Legend: O out_features, C in_features.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.execution.linear import QuantLinear
from viditq.quant.execution.variant import Variant
from viditq.quant.methods.quantizer import fake_quantize_activation, stored
from viditq.quant.methods.rounding.adaround import SHIFT, STRETCH, pull_gradient, soft_inverse
from viditq.quant.numerics.affine import code_range
from viditq.quant.numerics.granularity import per_weight, to_groups
from viditq.quant.numerics.packing import pack

NEAREST, SOFT, LEARNED = "nearest", "soft", "learned"


@dataclass
class Position:
    """What the SoftLinears of a block compute with: a segment's variants, a rounding, activations quantized or not."""

    segment: int = 0
    rounding: str = NEAREST
    activations: bool = True


class SoftWeight(nn.Module):
    """One weight behind its chain, less its low-rank branch, on its grid; `soft` is a, learned."""

    scale: Tensor
    zero: Tensor
    down: Tensor
    exact: Tensor
    nearest: Tensor

    def __init__(self, weight_OC: Tensor, variant: Variant) -> None:
        super().__init__()
        spec = variant.scheme.weight
        assert spec is not None
        self.spec: QuantSpec = spec
        quantized = variant.quantized_weight()
        assert quantized is not None
        scale = quantized.scale
        zero = torch.zeros_like(scale) if quantized.zero_point is None else quantized.zero_point.float()
        self.grid = (scale, zero)
        scale_OC, zero_OC = (per_weight(part, weight_OC, spec.group_size) for part in self.grid)
        down_OC = (weight_OC / scale_OC).floor()
        self.soft = nn.Parameter(soft_inverse(weight_OC / scale_OC - down_OC))
        self.register_buffer("scale", scale_OC.contiguous())
        self.register_buffer("zero", zero_OC.contiguous())
        self.register_buffer("down", down_OC + zero_OC)
        self.register_buffer("exact", weight_OC)
        self.register_buffer("nearest", variant.dequantized_weight().float())
        self.limits = code_range(spec.bits, spec.symmetric)

    def value(self, rounding: str) -> Tensor:
        """[O, C]; differentiable if soft."""
        if rounding == NEAREST:
            return self.nearest
        if rounding == SOFT:
            out: Tensor = _SoftRounding.apply(self.soft, self.down, self.zero, self.scale, self.limits)
            return out
        return (self.codes() - self.zero) * self.scale

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Decided, as `affine` counts them, float."""
        up_OC = STRETCH * self.soft.sigmoid() - SHIFT >= 0.5
        return (self.down + up_OC).clamp_(*self.limits)

    @torch.no_grad()
    def add_pull(self, strength: float, beta: float) -> None:
        """Adds the gradient of strength sum(1 - |2 h - 1|^beta) to that of `soft`, if the last step had one."""
        if self.soft.grad is None:  # a weight of other segments
            return
        h, slope = _soft(self.soft)
        self.soft.grad.addcmul_(pull_gradient(h, beta), slope, value=strength)


class _SoftRounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, soft: Tensor, down: Tensor, zero: Tensor, scale: Tensor, limits: tuple[int, int]) -> Tensor:
        h, slope = _soft(soft)
        codes = h.add_(down)
        free = (codes > limits[0]) & (codes < limits[1])
        ctx.save_for_backward(slope.mul_(free).mul_(scale))
        return codes.clamp_(*limits).sub_(zero).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope, None, None, None, None


def _soft(soft: Tensor) -> tuple[Tensor, Tensor]:
    """h(a) and its derivative."""
    sigmoid = soft.sigmoid()
    h = (STRETCH * sigmoid - SHIFT).clamp_(0, 1)
    return h, (1 - sigmoid).mul_(sigmoid).mul_(STRETCH).mul_((h > 0) & (h < 1))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: QuantSpec, grid: tuple[Tensor, Tensor] | None) -> Tensor:
        if grid is not None:
            low, high = code_range(spec.bits, spec.symmetric)
            codes = (to_groups(x, spec.group_size) / grid[0]).add_(grid[1])
            ctx.save_for_backward(((codes >= low - 0.5) & (codes <= high + 0.5)).view(x.shape))
        return fake_quantize_activation(x, spec, grid)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        return gradient * ctx.saved_tensors[0] if ctx.saved_tensors else gradient, None, None


class SoftVariant(nn.Module):
    """A Variant as a differentiable map. weight: shared with variants whose weight is the same, None = fixed."""

    weight: SoftWeight | None
    fixed: Tensor
    up: Tensor | None
    down: Tensor
    scale: Tensor | None
    zero: Tensor

    def __init__(self, variant: Variant, weight: SoftWeight | None, learn_scale: bool) -> None:
        super().__init__()
        self.spec, self.weight = variant.scheme.activation, weight
        self.chain = copy.deepcopy(variant.chain)
        self.register_buffer("fixed", None if weight is not None else variant.dequantized_weight().float())
        up = variant.low_rank_up
        self.register_buffer("up", None if up is None else up.float())
        self.register_buffer("down", None if up is None else variant.low_rank_down.float())
        grid = variant.input_qparams
        self.register_buffer("scale", None if grid is None else grid[0])
        self.register_buffer("zero", None if grid is None else grid[1])
        learned = learn_scale and grid is not None
        self.stretch = nn.Parameter(torch.zeros_like(grid[0])) if learned and grid else None  # scale exp(stretch)

    def forward(self, x: Tensor, position: Position, bias: Tensor | None) -> Tensor:
        y = self.chain.activation(x)
        branch = None if self.up is None else F.linear(F.linear(y, self.down), self.up)
        if self.spec is not None and position.activations:
            y = self._quantized(y, self.spec, position.rounding)
        weight = self.fixed if self.weight is None else self.weight.value(position.rounding)
        out = F.linear(y, weight, bias)
        return out if branch is None else out + branch

    def _quantized(self, y: Tensor, spec: QuantSpec, rounding: str) -> Tensor:
        if self.scale is None or self.stretch is None or rounding == NEAREST:
            grid = None if self.scale is None else (self.scale, self.zero)
            out: Tensor = _StraightThrough.apply(y, spec, grid)
            return out
        low, high = code_range(spec.bits, spec.symmetric)
        scale, view = self.scale * self.stretch.exp(), to_groups(y, spec.group_size)
        codes = view / scale  # the derivative by the scale follows (LSQ, arXiv 1902.08153)
        codes = codes + (codes.round() - codes).detach() + self.zero
        return ((codes.clamp(low, high) - self.zero) * scale).view(y.shape)

    @torch.no_grad()
    def write_to(self, variant: Variant) -> None:
        """What was learned, as codes and scale."""
        if self.weight is not None:
            codes = stored(self.weight.codes().to(torch.int16), self.weight.grid, self.weight.spec).codes
            assert variant.qweight is not None
            variant.qweight.copy_(pack(codes, self.weight.spec.bits))
        if self.scale is not None and self.stretch is not None:
            assert variant.input_scale is not None
            variant.input_scale.copy_(self.scale * self.stretch.exp())


class SoftLinear(nn.Module):
    """Stands for a QuantLinear in a copy of its block; `position` is shared by all of the block."""

    def __init__(
        self, layer: QuantLinear, weight_OC: Tensor, learned: list[bool], position: Position, learn_scale: bool
    ) -> None:
        """weight_OC: of the float Linear. learned: of each variant, whether its rounding is."""
        super().__init__()
        self.bias: Tensor | None
        self.position, self.segment_to_variant = position, layer.segment_to_variant
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())
        self.variants = nn.ModuleList()
        for variant, learn in zip(layer.variants, learned, strict=True):
            assert isinstance(variant, Variant)
            weight = self._soft_weight(variant, weight_OC) if learn else None
            self.variants.append(SoftVariant(variant, weight, learn_scale))

    def _soft_weight(self, variant: Variant, weight_OC: Tensor) -> SoftWeight:
        """That of an earlier variant, where theirs is the same weight on the same grid."""
        behind_OC = variant.chain.weight(weight_OC.float())
        if variant.low_rank_up is not None:
            behind_OC = behind_OC - variant.low_rank_up.float() @ variant.low_rank_down.float()
        new = SoftWeight(behind_OC, variant)
        known = (other.weight for other in self.soft_variants() if other.weight is not None)
        return next((weight for weight in known if _same(weight, new)), new)

    def soft_variants(self) -> list[SoftVariant]:
        """Those of the layer's variants, in their order."""
        return [cast(SoftVariant, variant) for variant in self.variants]

    def variant_of(self, segment: int) -> SoftVariant:
        """The one that a segment computes with."""
        return cast(SoftVariant, self.variants[self.segment_to_variant[segment]])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.variant_of(self.position.segment)(x, self.position, self.bias)
        return out

    def write_to(self, layer: QuantLinear) -> None:
        """What was learned, as the codes and scales of the QuantLinear."""
        for variant, soft in zip(layer.variants, self.soft_variants(), strict=True):
            assert isinstance(variant, Variant)
            soft.write_to(variant)


def _same(one: SoftWeight, other: SoftWeight) -> bool:
    return one.spec == other.spec and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in ("soft", "down", "scale")
    )


def soft_weights(module: nn.Module) -> list[SoftWeight]:
    """Those of a block, each once."""
    return [m for m in module.modules() if isinstance(m, SoftWeight)]
