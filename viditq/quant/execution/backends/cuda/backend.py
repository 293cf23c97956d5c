"""What `backend=auto` is on a CUDA device: the products of each shape as they are fastest there, by trial."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from viditq.quant.description.registry import BACKENDS
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.execution.backends.auto import first_that_takes
from viditq.quant.execution.backends.base import Backend, Unavailable
from viditq.quant.execution.backends.cuda.candidates import LAST, candidates_for
from viditq.quant.execution.backends.cuda.choice import choice_for, current
from viditq.quant.execution.backends.cuda.product import Product
from viditq.quant.execution.backends.signed import SignedWeight
from viditq.quant.execution.backends.triton import ops
from viditq.quant.execution.backends.triton.backend import NO_DEVICE, TritonBackend, why_not

TRIED = ("triton", "scaled_mm")
SCHEMA = ops.MULTIPLY.replace(", int[] tile", "")


@BACKENDS.register("cuda")
class CudaBackend(TritonBackend):
    """Triton's quantizer, and for each shape of a product whatever computes it fastest; said once.

    Formats of FP8 are `scaled_mm`'s; what neither takes is emulated, which is told too.
    """

    name = "cuda"

    def unsupported_field(self, scheme: LayerScheme) -> str | None:
        return None

    def check_available(self) -> None:
        """A device there has to be; what it cannot do is emulated."""
        if why_not() == NO_DEVICE:
            raise Unavailable(self.name, NO_DEVICE)

    def resolve(self, scheme: LayerScheme) -> Backend:
        if not scheme.quantizes:
            return self
        first = first_that_takes(scheme, TRIED)
        return self if first.name == "triton" else first

    def weight_bytes(self, scheme: LayerScheme, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        chosen = self.resolve(scheme)
        if chosen is self:
            return super().weight_bytes(scheme, out_features, in_features, dtype)
        return chosen.weight_bytes(scheme, out_features, in_features, dtype)

    def multiplied(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.ops.viditq.int8_product(*ops.arguments(*args, **kwargs))

    def load(self) -> None:
        super().load()
        _define()


@cache
def _define() -> None:
    torch.library.define("viditq::int8_product", SCHEMA)
    torch.library.impl("viditq::int8_product", ("cpu", "cuda"), _product)
    torch.library.register_fake("viditq::int8_product", lambda *args: ops.product_shape(*args))


def _product(
    codes: Tensor, scale: Tensor, zero: Tensor, rowsum: Tensor, symmetric: bool, weight: Tensor, weight_scale: Tensor,
    weight_zero: Tensor | None, colsum: Tensor, size: int, bias: Tensor | None, addend: Tensor | None, activation: int,
    gate: Tensor | None, residual: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    held = SignedWeight(weight, weight_scale, weight_zero, colsum, size, 0, weight.dtype == torch.uint8)
    x = ops.Quantized(codes, scale, zero, rowsum, symmetric)
    product = Product(x, held, bias, dtype, addend, activation, gate, residual)
    choice = choice_for(product, candidates_for(product), LAST)
    with current(product.device):
        return choice.taken.run(product)
