"""QuantLinear: a Linear whose weight is stored as codes, once per variant.

Legend: O out_features, C in_features.
"""

from __future__ import annotations

from collections import Counter
from typing import cast

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.quant.calibration.context import StepContext
from viditq.quant.execution.backends.base import Backend
from viditq.quant.execution.variant import Variant


class QuantLinear(nn.Module):
    """Drop-in for nn.Linear; the context's segment chooses the variant, the backend multiplies."""

    bias: nn.Parameter | None

    def __init__(
        self,
        name: str,
        bias: nn.Parameter | None,
        variants: list[Variant],
        segment_to_variant: list[int],
        out_features: int,
        context: StepContext,
        backend: Backend,
    ) -> None:
        super().__init__()
        self.name, self.in_features, self.out_features = name, variants[0].in_features, out_features
        self.variants = nn.ModuleList(variants)
        self.segment_to_variant = segment_to_variant
        self.register_parameter("bias", bias)
        self.context, self.backend = context, backend

    @property
    def dtype(self) -> torch.dtype:
        """Of the float Linear it stands for."""
        return cast(Variant, self.variants[0]).dtype

    def prepare(self) -> None:
        """Lets the backend derive what it needs from the stored tensors; call once they are real."""
        for variant in self.variants:
            self.backend.prepare(cast(Variant, variant))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., O]."""
        return self.backend.linear(self.current_variant(), x, self.bias)

    def current_variant(self) -> Variant:
        """Raises UserError when the answer depends on a segment and there is none."""
        if len(self.variants) == 1:
            return cast(Variant, self.variants[0])
        segment = self.context.segment
        if segment is None:
            raise UserError(
                f"{self.name} holds {len(self.variants)} variants but the noise level is unknown: "
                "call it through its denoiser, which reads the timestep"
            )
        return cast(Variant, self.variants[self.segment_to_variant[segment]])

    def extra_repr(self) -> str:
        names = [cast(Variant, v).scheme for v in self.variants]
        bits = ["/".join(str(s.bits) if s else "float" for s in (n.weight, n.activation)) for n in names]
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={bits}"


def quant_linears(denoiser: nn.Module) -> dict[str, QuantLinear]:
    """All QuantLinears by name."""
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, QuantLinear)}


def backend_counts(denoiser: nn.Module) -> dict[str, int]:
    """Name of a backend -> how many QuantLinears it computes; empty where nothing is quantized."""
    return dict(sorted(Counter(layer.backend.name for layer in quant_linears(denoiser).values()).items()))
