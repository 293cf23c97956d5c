"""The float weights that an artifact's codes stand for, a layer at a time.

Legend: O out_features, C in_features.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from viditq.interop.dequantize import variant_weight
from viditq.mapped import release
from viditq.quant.artifact import StoredTensors
from viditq.quant.convert import build_quantized
from viditq.quant.description.plan import QuantPlan
from viditq.quant.execution.linear import quant_linears
from viditq.quant.execution.variant import Variant


class FloatWeights:
    """denoiser: as it was built, on the meta device; its Linears are replaced. segment: whose weights they are."""

    def __init__(
        self, denoiser: nn.Module, plan: QuantPlan, tensors: StoredTensors, segment: int | None = None
    ) -> None:
        build_quantized(denoiser, plan)
        self._layers, self._tensors, self._state = quant_linears(denoiser), tensors, tensors.state()
        self._segment = segment

    def of(self, layer: str) -> Tensor:
        """float32 [O, C], from before the chain; without a segment the mean of those for several noise levels, which
        all stand for it.
        """
        if layer in self._layers and self._segment is not None:
            return self.in_segment(layer, self._segment)
        if layer not in self._layers:
            return self._tensors.of(f"{layer}.weight").float()
        weights = self._variants(layer)
        return torch.stack(weights).mean(0) if len(weights) > 1 else weights[0]

    def in_segment(self, layer: str, segment: int) -> Tensor:
        """The same of a layer that the plan names, for one segment's noise levels."""
        return self._variants(layer)[self._layers[layer].segment_to_variant[segment]]

    def _variants(self, layer: str) -> list[Tensor]:
        prefix = f"{layer}.variants."
        found = {n.removeprefix(prefix): self._tensors.of(n) for n in self._state if n.startswith(prefix)}
        variants = self._layers[layer].variants
        variants.load_state_dict(found, assign=True)
        weights = []
        for variant in variants:
            cast(Variant, variant).dtype = torch.float32
            weights.append(variant_weight(cast(Variant, variant)))
        release(found.values())
        return weights
