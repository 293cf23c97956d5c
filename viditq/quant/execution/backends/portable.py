"""Library operations alone: `torch._int_mm`. No compiler is needed; memory is saved, time hardly.

Legend: M rows, O out_features, C in_features, S segments of C that share all scales, g = C / S.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from viditq.quant.description.registry import BACKENDS
from viditq.quant.description.scheme import LayerScheme, QuantSpec
from viditq.quant.execution.backends.base import Unavailable
from viditq.quant.execution.backends.integer import IntegerBackend, scale_width
from viditq.quant.execution.backends.signed import SignedWeight, bytes_per_segment, signed_weight
from viditq.quant.execution.variant import Variant
from viditq.quant.methods.quantizer import QuantizedWeight, quantize_activation

PADDED_TO = 8  # CUDA takes multiples of 8; on a CPU one column gives wrong sums (torch 2.13)
ROWS_AT_LEAST = 17  # CUDA again


@BACKENDS.register("portable")
class PortableBackend(IntegerBackend):
    """Int8 weights whatever their bits. Unavailable where the library's product is not exact."""

    name = "portable"

    def check_available(self, device: str = "cpu") -> None:
        if not exact_product(device):
            raise Unavailable("portable", "torch._int_mm is not exact on this machine (a CPU without VNNI)")

    def weight_bytes(self, scheme: LayerScheme, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        if scheme.weight is None:
            return super().weight_bytes(scheme, out_features, in_features, dtype)
        size = scale_width(scheme, in_features)
        return out_features * (in_features + bytes_per_segment(size) * (in_features // size))

    def hold(self, quantized: QuantizedWeight, weight: QuantSpec, segment_size: int) -> SignedWeight:
        self.check_available(quantized.codes.device.type)
        padded = segment_size + -segment_size % PADDED_TO
        return signed_weight(quantized, weight.bits, segment_size, padded, rows_padded_to=PADDED_TO)

    def multiply(
        self, variant: Variant, x: Tensor, bias: Tensor | None, div: Tensor | None, addend: Tensor | None
    ) -> Tensor:
        spec, weight = variant.scheme.activation, variant.held
        assert spec is not None and isinstance(weight, SignedWeight)
        leading, rows = x.shape[:-1], x.shape[:-1].numel()
        segments, out_features = weight.colsum.shape
        if rows == 0:
            return x.new_empty(*leading, out_features, dtype=variant.dtype)
        quantized = quantize_activation(x if div is None else x / div, spec, variant.input_qparams)
        codes_SMg = quantized.codes.view(rows, segments, weight.size).transpose(0, 1)
        scale_MS, zero_MS = (
            part.reshape(rows, -1).repeat_interleave(segments * rows // part.numel(), 1)
            for part in (quantized.scale, quantized.zero_point)
        )
        y = torch.zeros(rows, out_features, device=x.device)
        for s in range(segments):
            zero = zero_MS[:, s, None].to(torch.int32)
            rest = codes_SMg[s].sum(-1, True, dtype=torch.int32) - weight.size * zero
            sums = _product(codes_SMg[s], weight.data[s])[:, :out_features]
            exact = sums.sub_(zero * weight.colsum[s])
            if weight.zero_point is not None:
                exact.sub_(weight.zero_point[s] * rest)
            y.addcmul_(exact.float(), scale_MS[:, s, None] * weight.scale[s])
        if bias is not None:
            y += bias
        if addend is not None:
            y += addend.reshape(rows, out_features)
        return y.to(variant.dtype).view(*leading, out_features)


def _product(codes_Mg: Tensor, data_Og: Tensor) -> Tensor:
    """Exact int32 [M, O padded] of uint8 codes and int8 weights."""
    rows, size = codes_Mg.shape
    if codes_Mg.device.type == "cpu":
        return torch._int_mm(F.pad(codes_Mg, (0, -size % PADDED_TO)), data_Og.T)
    missing = max(ROWS_AT_LEAST - rows, 0)  # a GPU takes int8 alone
    signed_Mg = F.pad((codes_Mg.to(torch.int16) - 128).to(torch.int8), (0, -size % PADDED_TO, 0, missing))
    return torch._int_mm(signed_Mg, data_Og.T)[:rows] + 128 * data_Og.sum(-1, dtype=torch.int32)


@lru_cache(maxsize=8)
def exact_product(device: str) -> bool:
    """Whether `torch._int_mm` adds up extreme codes exactly, as it does not where pairs saturate in 16 bits."""
    codes_Mg = torch.full((ROWS_AT_LEAST, 1152), 255, dtype=torch.uint8, device=device)
    data_Og = torch.full((16, 1152), 127, dtype=torch.int8, device=device)
    data_Og[::2] = -128
    expected = (codes_Mg.double() @ data_Og.double().T).to(torch.int32)
    try:
        return torch.equal(_product(codes_Mg, data_Og), expected)
    except RuntimeError:
        return False
