"""Emulation in floating point: the reference every other backend must agree with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from viditq.quant.description.registry import BACKENDS
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.execution.backends.base import Backend
from viditq.quant.execution.variant import Variant
from viditq.quant.methods.quantizer import fake_quantize_activation


@BACKENDS.register("fake")
class FakeBackend(Backend):
    """Keeps the weight dequantized; per call only the chain, the activation's grid and a product remain."""

    name = "fake"

    def unsupported_field(self, scheme: LayerScheme) -> str | None:
        return None

    def weight_bytes(self, scheme: LayerScheme, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Codes, and the weight that they stand for."""
        held = super().weight_bytes(scheme, out_features, in_features, dtype)
        return held if scheme.weight is None else held + out_features * in_features * dtype.itemsize

    def prepare(self, variant: Variant) -> None:
        variant.register_buffer("dense_weight", variant.dequantized_weight(), persistent=False)

    @torch.no_grad()
    def linear(self, variant: Variant, x: Tensor, bias: Tensor | None) -> Tensor:
        y = variant.chain.activation(x)
        spec, weight_OC = variant.scheme.activation, variant.dense_weight
        assert isinstance(weight_OC, Tensor)
        branch: Tensor | None = None
        if variant.low_rank_up is not None:  # before the quantizer, which may overwrite y
            branch = F.linear(F.linear(y.to(weight_OC.dtype), variant.low_rank_down), variant.low_rank_up)
        if spec is not None:
            y = fake_quantize_activation(y, spec, variant.input_qparams, inplace=y is not x)
        out = F.linear(y.to(weight_OC.dtype), weight_OC, bias)
        return out if branch is None else out.add_(branch)
