"""Variant: the tensors of one Linear for one or more segments.

Legend: O out_features, C in_features, B bytes of a packed row, r rank of the low-rank branch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from viditq.quant.description.scheme import LayerScheme, QuantSpec
from viditq.quant.methods.fitted_weight import FittedWeight, empty_fit, fit_weight
from viditq.quant.methods.quantizer import Grid, QuantizedWeight, dequantize_weight, static_qparams
from viditq.quant.methods.transforms import Chain
from viditq.quant.numerics.packing import pack, unpack

CAST = ("weight", "low_rank_up", "low_rank_down")
"""Tensors of a float type, as those of a float Linear."""


class HeldWeight(Protocol):
    """A quantized weight in a backend's own layout: a NamedTuple."""

    def __iter__(self) -> Iterator[Any]: ...

    def codes(self) -> Tensor:
        """uint8 [O, C], as `QuantizedWeight` has them."""

    def grid(self, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point (None: symmetric), as `QuantizedWeight` has them."""

    def moved(self, move: Callable[[Tensor], Tensor]) -> HeldWeight:
        """The same with each of its tensors moved."""


class Variant(nn.Module):
    """The canonical tensors of one Linear for one or more segments.

    qweight uint8 [O, B] packed codes, weight_scale float32, weight_zero_point uint8 (asymmetric only), or
    weight_tensor_scale float32 [1, 1, 1] (formats with a scale of the whole tensor beside those of blocks), or
    weight [O, C] when it stays in float; low_rank_up [O, r], low_rank_down [r, C] of a low-rank branch; input_scale,
    input_zero_point float32 (static activations only); the chain's own tensors. dtype: of the float Linear, which the
    output keeps. A backend's `prepare` adds what is not stored. held: codes and grid, once a backend took them over;
    qweight, weight_scale and weight_zero_point are None then and made anew for the state dict: all is in memory once.
    derived: what a backend made of it and of its neighbours, by name; forgotten when it moves.
    """

    weight: Tensor | None
    qweight: Tensor | None
    weight_scale: Tensor | None
    weight_zero_point: Tensor | None
    weight_tensor_scale: Tensor | None
    low_rank_up: Tensor | None
    low_rank_down: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor

    def __init__(
        self,
        scheme: LayerScheme,
        fitted: FittedWeight,
        chain: Chain,
        in_features: int,
        dtype: torch.dtype,
        input_grid: Grid | None = None,
    ) -> None:
        """input_grid: scale and zero point of a static activation."""
        super().__init__()
        assert (input_grid is not None) == scheme.static_activation
        self.scheme, self.chain, self.dtype, self.in_features = scheme, chain, dtype, in_features
        self.held: HeldWeight | None = None
        self.derived: dict[str, Any] = {}
        self.register_buffer("weight", fitted.weight)
        self.register_buffer("qweight", fitted.packed)
        self.register_buffer("weight_scale", fitted.scale)
        self.register_buffer("weight_zero_point", fitted.zero_point)
        self.register_buffer("weight_tensor_scale", fitted.tensor_scale)
        self.register_buffer("low_rank_up", fitted.up)
        self.register_buffer("low_rank_down", fitted.down)
        self.register_buffer("input_scale", input_grid and input_grid[0])
        self.register_buffer("input_zero_point", input_grid and input_grid[1])

    @classmethod
    def fit(
        cls,
        scheme: LayerScheme,
        weight_OC: Tensor,
        chain: Chain,
        input_grid: Grid | None = None,
        moments: Callable[[], Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Variant:
        """From the float weight, before the chain.

        moments: makes X^T X [C, C] of the inputs before the chain, which then is let go of as soon as possible.
        dtype: in which the float layer computes, where its weight is stored in another; None = the weight's.
        """
        dtype = dtype or weight_OC.dtype
        fitted = fit_weight(weight_OC, chain, scheme, moments, dtype)
        return cls(scheme, fitted, chain, weight_OC.shape[1], dtype, input_grid)

    @property
    def input_qparams(self) -> tuple[Tensor, Tensor] | None:
        """Scale and zero point of a static activation."""
        return None if self.input_scale is None else (self.input_scale, self.input_zero_point)

    def quantized_weight(self) -> QuantizedWeight | None:
        """Codes and grid; None when the weight stays in float."""
        if self.held is not None:
            assert self.scheme.weight is not None
            return QuantizedWeight(self.held.codes(), *self.held.grid(self.scheme.weight))
        if self.scheme.weight is None or self.qweight is None or self.weight_scale is None:
            return None
        codes_OC = unpack(self.qweight, self.scheme.weight.bits, self.in_features)
        return QuantizedWeight(codes_OC, self.weight_scale, self.weight_zero_point, self.weight_tensor_scale)

    def dequantized_weight(self) -> Tensor:
        """What the product with the quantized input sees, [O, C] in `dtype`."""
        quantized = self.quantized_weight()
        if quantized is None:
            assert self.weight is not None
            return self.weight
        assert self.scheme.weight is not None
        return dequantize_weight(quantized, self.scheme.weight).to(self.dtype)

    @property
    def has_derived(self) -> bool:
        """Whether a backend has made buffers that are not stored."""
        return bool(self._non_persistent_buffers_set)

    def held_tensors(self) -> list[Tensor]:
        """What lies in memory in a backend's layout; of neighbours that share one tensor each has its part."""
        return [] if self.held is None else [part for part in self.held if isinstance(part, Tensor)]

    def hand_over(self, held: HeldWeight) -> None:
        """`held` keeps codes and grid from now on; what is stored is let go of."""
        self.held, self.qweight = held, None
        self.weight_scale = self.weight_zero_point = None

    def take_back(self) -> None:
        """Only what is stored is left, whatever a backend has made of it."""
        quantized = self.quantized_weight() if self.held is not None else None
        if quantized is not None:
            assert self.scheme.weight is not None
            self.qweight = pack(quantized.codes, self.scheme.weight.bits)
            self.weight_scale, self.weight_zero_point = quantized.scale, quantized.zero_point
        self.held = None
        self.derived.clear()
        for name in self._non_persistent_buffers_set:
            self._buffers.pop(name)
        self._non_persistent_buffers_set.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Variant:
        """To another device; what is cast is the output and what is float beside the codes.

        Scales, zero points and the chain stay what they are: in half precision they would be others, and so would the
        codes. What is held has the types of its layout; what a backend derived `QuantLinear._apply` derives anew.
        """
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        cast = {name: fn(part) for name in CAST if (part := self._buffers[name]) is not None}
        self._buffers.update(cast)
        super()._apply(partial(_moved, fn), recurse)
        if self.held is not None:
            self.held = self.held.moved(lambda tensor: tensor.to(fn(tensor).device))
            self.derived.clear()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.held is not None:
            assert self.scheme.weight is not None
            scale, zero_point = self.held.grid(self.scheme.weight)
            packed = pack(self.held.codes(), self.scheme.weight.bits)
            parts = {"qweight": packed, "weight_scale": scale, "weight_zero_point": zero_point}
            destination.update({f"{prefix}{name}": part for name, part in parts.items() if part is not None})


def _moved(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """fn(tensor) as long as it is no cast, else only its device."""
    made = fn(tensor)
    return made if made.dtype == tensor.dtype else tensor.to(made.device)


def empty_variant(scheme: LayerScheme, in_features: int, out_features: int, dtype: torch.dtype) -> Variant:
    """The structure of a variant on the meta device, to be filled from an artifact."""
    fitted = empty_fit(scheme, out_features, in_features, dtype)
    grid: Grid | None = None
    if scheme.static_activation:
        assert scheme.activation is not None
        channel = torch.empty(in_features, device="meta")
        grid = static_qparams(channel, channel, scheme.activation)
    chain = Chain([t.empty(in_features) for t in scheme.transforms])
    return Variant(scheme, fitted, chain, in_features, dtype, grid)
