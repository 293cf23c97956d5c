"""The backend of the C++ kernels: x86-64 with AVX512-VNNI or AMX."""

from __future__ import annotations

import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.quant.description.registry import BACKENDS
from viditq.quant.description.scheme import QuantSpec
from viditq.quant.execution.backends.integer import IntegerBackend
from viditq.quant.execution.backends.native import ops
from viditq.quant.execution.backends.native.layout import PackedWeight, pack_weight
from viditq.quant.execution.variant import Variant
from viditq.quant.methods.quantizer import QuantizedWeight

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@BACKENDS.register("native")
class NativeBackend(IntegerBackend):
    """One fused operator a Linear. The kernels are built on first use: `check_available`, or the first `prepare`."""

    name = "native"

    def check_available(self) -> None:
        ops.load()

    def hold(self, quantized: QuantizedWeight, weight: QuantSpec, segment_size: int) -> PackedWeight:
        self.check_available()
        codes, scale, zero_point = quantized
        if codes.device.type != "cpu":
            raise UserError(f"backend native runs on a CPU, not on {codes.device}; choose another one there, or fake")
        return pack_weight(codes, scale, zero_point, weight.bits, segment_size)

    def multiply(
        self, variant: Variant, x: Tensor, bias: Tensor | None, div: Tensor | None, addend: Tensor | None
    ) -> Tensor:
        spec = variant.scheme.activation
        assert spec is not None and isinstance(variant.held, PackedWeight)
        return ops.linear(
            x if x.dtype in FLOATS else x.float(),
            variant.held,
            bias,
            spec,
            variant.input_qparams,
            div=div,
            addend=addend,
            out_dtype=variant.dtype,
        )
