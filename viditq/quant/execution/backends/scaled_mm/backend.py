"""The backend of torch's product of FP8 numbers: what sm_89 and later have instructions for."""

from __future__ import annotations

import logging
from functools import cache, lru_cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from viditq.quant.description.registry import BACKENDS
from viditq.quant.description.scheme import LayerScheme, QuantSpec
from viditq.quant.execution.backends.base import Unavailable
from viditq.quant.execution.backends.cuda.choice import choice_for, current, disagreement
from viditq.quant.execution.backends.fusing import FusingBackend, ranged
from viditq.quant.execution.backends.scaled_mm.product import (
    LAST,
    MULTIPLE,
    OF_TORCH,
    Float8Product,
    Float8Weight,
    candidates_for,
)
from viditq.quant.execution.backends.triton import float8, ops
from viditq.quant.execution.backends.triton.backend import tell_of_assembler, too_old
from viditq.quant.execution.surroundings import ACTIVATIONS, NOTHING_AFTER, After, Before
from viditq.quant.execution.variant import Variant
from viditq.quant.methods.quantizer import QuantizedWeight, narrow_activation
from viditq.quant.numerics.float_grid import NUMBERS

logger = logging.getLogger("viditq")
CAPABILITY = (8, 9)  # of CUDA devices
ONE_PASS = ("cuda",)  # devices on which the kernel quantizes
GRANULARITIES = {"weight": ("tensor", "channel"), "activation": ("tensor", "token")}
SCHEMA = (
    "(Tensor codes, Tensor scale, Tensor weight, Tensor weight_scale, int outs, int width, Tensor? bias, "
    "Tensor? addend, int activation, Tensor? gate, Tensor? residual, ScalarType dtype) -> Tensor"
)


class Rows(NamedTuple):
    """codes: torch's FP8 [M, Q]. scale: float32 [M, 1], or [1, 1] where all share one."""

    codes: Tensor
    scale: Tensor


@BACKENDS.register("scaled_mm")
class ScaledMmBackend(FusingBackend):
    """FP8 codes of both sides, held and multiplied as they are, by what a trial of each shape finds fastest.

    Codes equal those of `fake`. On a CPU, where torch has this product too, it saves memory, not time.
    """

    name = "scaled_mm"
    has_kernel = False
    """Whether triton's kernel quantizes on a GPU; passes of torch do where not."""

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
        tell_of_assembler()
        self.has_kernel = one_pass() is None
        (outs, width), dtype = quantized.codes.shape, NUMBERS[weight.number].dtype
        assert dtype is not None
        data_PQ = F.pad(quantized.codes, (0, _padded(width) - width, 0, _padded(outs) - outs))
        return Float8Weight(data_PQ.contiguous().view(dtype), quantized.scale, outs, width)

    def quantized(self, variant: Variant, x: Tensor, before: Before, div: Tensor | None) -> Rows:
        spec, weight = variant.scheme.activation, _weight(variant)
        assert spec is not None
        if self.has_kernel and x.device.type in ONE_PASS:
            x, before, div, grid = ranged(variant, x, before, div)
            dtype = NUMBERS[spec.number].dtype
            assert dtype is not None
            return Rows(*float8.quantize(
                x, weight.data.shape[1], dtype, eps=before.eps, mul=before.mul, add=before.add, div=div,
                scale=None if grid is None else grid[0],
            ))  # fmt: skip
        y = x if before.is_nothing else before.apply(x.float())
        codes, scale = narrow_activation(y if div is None else y / div, spec, variant.input_qparams)
        if scale.numel() > 1 or spec.dynamic:
            scale = scale.expand(*x.shape[:-1], 1).reshape(-1, 1)
        codes_MQ = codes.reshape(-1, weight.width)
        padding = weight.data.shape[1] - weight.width
        if padding:  # torch pads no FP8
            codes_MQ = F.pad(codes_MQ.view(torch.uint8), (0, padding)).view(codes.dtype)
        return Rows(codes_MQ, scale.view(-1, 1))

    def product(
        self,
        variant: Variant,
        quantized: Rows,
        x: Tensor,
        bias: Tensor | None,
        after: After = NOTHING_AFTER,
        addend: Tensor | None = None,
    ) -> Tensor:
        weight = _weight(variant)
        return torch.ops.viditq.float8_product(
            *quantized, weight.data, weight.scale, weight.outs, weight.width, bias, ops.as_rows(addend),
            ACTIVATIONS.index(after.activation), ops.whole(after.gate), ops.as_rows(after.residual),
            after.dtype or variant.dtype,
        ).view(*x.shape[:-1], weight.outs)  # fmt: skip

    @staticmethod
    def same_cut(variant: Variant, first: Variant) -> bool:
        return _weight(variant).width == _weight(first).width


def _weight(variant: Variant) -> Float8Weight:
    return cast(Float8Weight, variant.held)


def _padded(count: int) -> int:
    return count + -count % MULTIPLE


@cache
def _define() -> None:
    torch.library.define("viditq::float8_product", SCHEMA)
    torch.library.impl("viditq::float8_product", ("cpu", "cuda"), _product)
    torch.library.register_fake("viditq::float8_product", _product_shape)


def _product(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, outs: int, width: int, bias: Tensor | None,
    addend: Tensor | None, activation: int, gate: Tensor | None, residual: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    held, behind = Float8Weight(weight, weight_scale, outs, width), (addend, activation, gate, residual)
    product = Float8Product(codes, scale, held, bias, dtype, *behind)
    if len(codes) == 0:
        return codes.new_empty((0, outs), dtype=dtype)
    choice = choice_for(product, candidates_for(product), LAST)
    with current(product.device):
        return choice.taken.run(product).contiguous()


def _product_shape(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, outs: int, *rest: Any) -> Tensor:
    return codes.new_empty((len(codes), outs), dtype=rest[-1])


def why_not() -> str | None:
    """Why FP8 is not multiplied on this machine, in a few words; None = it is."""
    if torch.cuda.is_available():
        return too_old(CAPABILITY, "FP8")
    return None if _exact_on_cpu() else "torch._scaled_mm is not exact on this machine"


@lru_cache(maxsize=1)
def one_pass() -> str | None:
    """Why our kernel does not quantize on this machine's GPU, which is told; None = it does, or there is none."""
    reason = None
    if not float8.installed():
        reason = "the package triton is not installed (pip install triton)"
    elif torch.cuda.is_available() and not exact_codes("cuda"):
        reason = "our kernel disagrees with fake on this device"
    if reason is not None and torch.cuda.is_available():
        logger.info("inputs in FP8 are quantized in several passes of torch: %s", reason)
    return reason


@lru_cache(maxsize=2)
def exact_codes(device: str) -> bool:
    """Whether the kernel finds `fake`'s codes: ties, the smallest and largest numbers, rows of zeros, NaN, infinity."""
    float8.load()
    steps = torch.arange(-256.0, 256.0)
    rows = [steps, steps / 3, steps * 1e30, steps * 2.0**-140, torch.linspace(-448, 448, 512), torch.zeros(512)]
    x_MC = torch.stack([*rows, torch.exp2(steps / 16), steps.clone(), steps.clone()])
    x_MC[-1, 7], x_MC[-2, 7] = torch.nan, torch.inf
    for number in ("e4m3", "e5m2"):
        spec = QuantSpec(8, True, "token", dynamic=True, number=number)
        wanted, scale = narrow_activation(x_MC, spec, None)
        found = Rows(*float8.quantize(x_MC.to(device), 512, wanted.dtype))
        pairs = ((found.codes.float(), wanted.float()), (found.scale, scale))
        if not all(torch.equal(mine.cpu().nan_to_num(1e9), other.nan_to_num(1e9)) for mine, other in pairs):
            return False
    return True


@lru_cache(maxsize=1)
def _exact_on_cpu() -> bool:
    """Whether the largest numbers are added up as float32 does."""
    codes = torch.ones(MULTIPLE, 64).to(torch.float8_e4m3fn)
    weight = Float8Weight(codes, torch.ones(MULTIPLE, 1), MULTIPLE, 64)
    product = Float8Product(codes, torch.ones(MULTIPLE, 1), weight, None, torch.float32).extreme()
    try:
        return disagreement(OF_TORCH[1].run(product), product) <= 1
    except RuntimeError:
        return False
