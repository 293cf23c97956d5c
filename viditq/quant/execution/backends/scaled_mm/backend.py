"""The backend of torch's product of FP8 numbers: what sm_89 and later have instructions for."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from viditq.quant.description.registry import BACKENDS
from viditq.quant.description.scheme import LayerScheme, QuantSpec
from viditq.quant.execution.backends.base import Unavailable
from viditq.quant.execution.backends.cuda.choice import choice_for, disagreement
from viditq.quant.execution.backends.integer import IntegerBackend
from viditq.quant.execution.backends.scaled_mm.product import (
    CANDIDATES,
    LAST,
    MULTIPLE,
    Float8Product,
    Float8Weight,
)
from viditq.quant.execution.backends.triton.backend import too_old
from viditq.quant.execution.variant import Variant
from viditq.quant.methods.quantizer import QuantizedWeight, narrow_activation
from viditq.quant.numerics.float_grid import NUMBERS

CAPABILITY = (8, 9)  # of CUDA devices
GRANULARITIES = {"weight": ("tensor", "channel"), "activation": ("tensor", "token")}
SCHEMA = (
    "(Tensor codes, Tensor scale, Tensor weight, Tensor weight_scale, int outs, int width, Tensor? bias, "
    "ScalarType dtype) -> Tensor"
)


@BACKENDS.register("scaled_mm")
class ScaledMmBackend(IntegerBackend):
    """FP8 codes of both sides, held and multiplied as they are, by what a trial of each shape finds fastest.

    Codes equal those of `fake`. On a CPU, where torch has this product too, it saves memory, not time.
    """

    name = "scaled_mm"

    def unsupported_field(self, scheme: LayerScheme) -> str | None:
        if scheme.weight is None and scheme.activation is None:
            return None  # a segment that stays in float
        for side, spec in (("weight", scheme.weight), ("activation", scheme.activation)):
            if spec is None:
                return side
            if NUMBERS.get(spec.number, NUMBERS["e2m1"]).dtype is None:
                return f"{side}.number"
            if spec.granularity not in GRANULARITIES[side]:
                return f"{side}.granularity"
        assert scheme.weight is not None and scheme.activation is not None
        both = scheme.weight.number == scheme.activation.number == "e5m2"  # no CUDA device multiplies two of these
        return "activation.number" if both else None

    def check_available(self) -> None:
        reason = why_not()
        if reason is not None:
            raise Unavailable(self.name, reason)

    def weight_bytes(self, scheme: LayerScheme, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        held = super().weight_bytes(scheme, out_features, in_features, dtype)
        if scheme.weight is None:
            return held
        return held - out_features * in_features + _padded(out_features) * _padded(in_features)

    def hold(self, quantized: QuantizedWeight, weight: QuantSpec, segment_size: int) -> Float8Weight:
        self.check_available()
        _define()
        (outs, width), dtype = quantized.codes.shape, NUMBERS[weight.number].dtype
        assert dtype is not None
        data_PQ = F.pad(quantized.codes, (0, _padded(width) - width, 0, _padded(outs) - outs))
        return Float8Weight(data_PQ.contiguous().view(dtype), quantized.scale, outs, width)

    def multiply(
        self, variant: Variant, x: Tensor, bias: Tensor | None, div: Tensor | None, addend: Tensor | None
    ) -> Tensor:
        spec, weight, leading = variant.scheme.activation, cast(Float8Weight, variant.held), x.shape[:-1]
        assert spec is not None
        codes, scale = narrow_activation(x if div is None else x / div, spec, variant.input_qparams)
        if scale.numel() > 1 or spec.dynamic:
            scale = scale.expand(*leading, 1).reshape(-1, 1)
        codes_MQ = codes.reshape(-1, weight.width)
        if weight.data.shape[1] != weight.width:  # torch pads no FP8
            padding = weight.data.shape[1] - weight.width
            codes_MQ = F.pad(codes_MQ.view(torch.uint8), (0, padding)).view(codes.dtype)
        out = torch.ops.viditq.float8_product(
            codes_MQ, scale.view(-1, 1), weight.data, weight.scale, weight.outs, weight.width, bias, variant.dtype
        ).view(*leading, weight.outs)
        return out if addend is None else out.add_(addend)


def _padded(count: int) -> int:
    return count + -count % MULTIPLE


@cache
def _define() -> None:
    torch.library.define("viditq::float8_product", SCHEMA)
    torch.library.impl("viditq::float8_product", ("cpu", "cuda"), _product)
    torch.library.register_fake("viditq::float8_product", _product_shape)


def _product(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, outs: int, width: int, bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    product = Float8Product(codes, scale, Float8Weight(weight, weight_scale, outs, width), bias, dtype)
    if len(codes) == 0:
        return _product_shape(codes, scale, weight, weight_scale, outs, width, bias, dtype)
    return choice_for(product, CANDIDATES, LAST).taken.run(product).contiguous()


def _product_shape(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, outs: int, width: int, bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return codes.new_empty((len(codes), outs), dtype=dtype)


def why_not() -> str | None:
    """Why FP8 is not multiplied on this machine, in a few words; None = it is."""
    if torch.cuda.is_available():
        return too_old(CAPABILITY, "FP8")
    return None if _exact_on_cpu() else "torch._scaled_mm is not exact on this machine"


@lru_cache(maxsize=1)
def _exact_on_cpu() -> bool:
    """Whether the largest numbers are added up as float32 does."""
    codes = torch.ones(MULTIPLE, 64).to(torch.float8_e4m3fn)
    weight = Float8Weight(codes, torch.ones(MULTIPLE, 1), MULTIPLE, 64)
    product = Float8Product(codes, torch.ones(MULTIPLE, 1), weight, None, torch.float32).extreme()
    try:
        return disagreement(CANDIDATES[1].run(product), product) <= 1
    except RuntimeError:
        return False
