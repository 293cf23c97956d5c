"""A quantization method of diffusers for tests: weights rounded to `bits` per row, kept as int8, activations float."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

METHOD = "rounded"


class Method(StrEnum):
    ROUNDED = METHOD


class RoundedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """skip: full names of Linears left in float; savable: whether save_pretrained works."""

    def __init__(
        self, bits: int = 8, skip: list[str] | None = None, savable: bool = True, quant_method: str = METHOD
    ) -> None:
        self.quant_method, self.bits, self.skip, self.savable = Method(quant_method), bits, skip, savable

    def to_diff_dict(self) -> dict[str, Any]:
        return dict(self.to_dict())


class RoundedLinear(nn.Module):
    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        largest = 2 ** (bits - 1) - 1
        scale = linear.weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / largest
        self.register_buffer("codes", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes * self.scale, self.bias)


class RoundedQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        model.config.quantization_config = self.quantization_config

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        skip = self.quantization_config.skip or []
        for name, module in [*model.named_modules()]:
            if type(module) is nn.Linear and name not in skip:
                model.set_submodule(name, RoundedLinear(module, self.quantization_config.bits))
        return model

    @property
    def is_serializable(self) -> bool:
        return bool(self.quantization_config.savable)

    @property
    def is_trainable(self) -> bool:
        return False


auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = RoundedConfig
auto.AUTO_QUANTIZER_MAPPING[METHOD] = RoundedQuantizer
