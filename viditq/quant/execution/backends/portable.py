"""Library operations alone: `torch._int_mm`. No compiler is needed; memory is saved, time hardly.

Legend: M rows, O out_features, C in_features, S segments of C that share all scales, g = C / S.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from viditq.quant.description.registry import BACKENDS
from viditq.quant.description.scheme import LayerScheme, QuantSpec
from viditq.quant.execution.backends.base import Unavailable
from viditq.quant.execution.backends.integer import IntegerBackend, scale_width, stored_grid
from viditq.quant.execution.variant import Variant
from viditq.quant.methods.quantizer import QuantizedWeight, quantize_activation

PADDED_TO = 8  # CUDA takes multiples of 8; on a CPU one column gives wrong sums (torch 2.13)
BYTES_PER_SEGMENT = 12  # of an output: scale, zero point, sum of codes
ROWS_AT_LEAST = 17  # CUDA again


class SignedWeight(NamedTuple):
    """data int8 [S, O, g padded], code - 128 at 8 bits, the code below; scale, zero_point, colsum [S, O]."""

    data: Tensor
    scale: Tensor
    zero_point: Tensor
    colsum: Tensor
    size: int
    shift: int

    def moved(self, move: Callable[[Tensor], Tensor]) -> SignedWeight:
        """The same with each of its tensors moved."""
        moved = self._replace(data=move(self.data), scale=move(self.scale))
        return moved._replace(zero_point=move(self.zero_point), colsum=move(self.colsum))

    def codes(self) -> Tensor:
        """uint8 [O, C]."""
        codes_OSg = self.data[:, : self.scale.shape[1], : self.size].transpose(0, 1).to(torch.int16) + self.shift
        return codes_OSg.flatten(1).to(torch.uint8)

    def grid(self, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point as `hold` was given them."""
        return stored_grid(self.scale.T, self.zero_point.T, self.shift, spec, len(self.scale) * self.size)


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
        segments = in_features // scale_width(scheme, in_features)
        return out_features * (in_features + BYTES_PER_SEGMENT * segments)

    def hold(self, quantized: QuantizedWeight, weight: QuantSpec, segment_size: int) -> SignedWeight:
        codes_OC, scale, zero_point, _ = quantized
        self.check_available(codes_OC.device.type)
        shift = 128 if weight.bits == 8 else 0
        out_features, in_features = codes_OC.shape
        segments = in_features // segment_size

        def per_segment(values: Tensor) -> Tensor:
            values_OG = values.reshape(len(values), -1).expand(out_features, -1)
            return values_OG.repeat_interleave(segments // values_OG.shape[1], 1).T.contiguous()

        zero = torch.full_like(scale, 2.0 ** (weight.bits - 1)) if zero_point is None else zero_point
        data_OSg = (codes_OC.to(torch.int16) - shift).to(torch.int8).view(out_features, segments, segment_size)
        data_SOg = F.pad(data_OSg.transpose(0, 1), (0, -segment_size % PADDED_TO, 0, -out_features % PADDED_TO))
        colsum = data_SOg.sum(-1, dtype=torch.int32)[:, :out_features]
        zero_point = per_segment(zero).to(torch.int32) - shift
        return SignedWeight(data_SOg.contiguous(), per_segment(scale.float()), zero_point, colsum, segment_size, shift)

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
            exact = sums.sub_(zero * weight.colsum[s]).sub_(weight.zero_point[s] * rest)
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
