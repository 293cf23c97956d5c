"""The backend of the Triton kernels: GPUs with int8 products; quantizer and surroundings in the same passes."""

from __future__ import annotations

import logging
import os
from functools import cache, lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from viditq.quant.description.registry import BACKENDS
from viditq.quant.description.scheme import LayerScheme, QuantSpec
from viditq.quant.execution.backends.base import Unavailable
from viditq.quant.execution.backends.fusing import FusingBackend, ranged
from viditq.quant.execution.backends.integer import scale_width
from viditq.quant.execution.backends.signed import SignedWeight, bytes_per_segment, signed_weight
from viditq.quant.execution.backends.triton import ops
from viditq.quant.execution.backends.triton.tiles import FEW, MANY, Tile, padded_width
from viditq.quant.execution.surroundings import ACTIVATIONS, NOTHING_AFTER, After, Before
from viditq.quant.execution.variant import Variant
from viditq.quant.methods.quantizer import QuantizedWeight, quantize_activation

logger = logging.getLogger("viditq")
INTERPRETER = "TRITON_INTERPRET"  # triton's own variable: kernels run on a CPU, in numpy
NO_DEVICE = "there is no CUDA device"
PROBED = 16, 384, 32  # rows, in-features and outputs of the products that are tried at load: several steps of a sum
PROBED_CUTS = FEW, MANY[0]  # small and large matrix instructions
HOPPER, ASSEMBLER = (9, 0), (13, 1)
"""ptxas before 13.1 has got kernels of sm_90 wrong (triton's issue 11366): sums, and addresses of shared memory."""
CAPABILITY = (8, 0)  # of CUDA devices; triton multiplies no int8 on older ones


@BACKENDS.register("triton")
class TritonBackend(FusingBackend):
    """Two operators a Linear: one quantizes, one multiplies and does what stands behind the product."""

    name = "triton"

    def check_available(self) -> None:
        reason = why_not()
        if reason is not None:
            raise Unavailable(self.name, reason)

    def weight_bytes(self, scheme: LayerScheme, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Codes, up to 4 bits two in a byte, and for each output and segment what `bytes_per_segment` counts."""
        if scheme.weight is None:
            return super().weight_bytes(scheme, out_features, in_features, dtype)
        size = scale_width(scheme, in_features)
        codes = padded_width(size) // (2 if scheme.weight.bits <= 4 else 1)
        return out_features * (in_features // size) * (codes + bytes_per_segment(size))

    def hold(self, quantized: QuantizedWeight, weight: QuantSpec, segment_size: int) -> SignedWeight:
        self.check_available()
        self.load()
        tell_of_assembler()
        if not exact_product("cuda" if torch.cuda.is_available() else "cpu"):
            raise Unavailable(self.name, "its kernels disagree with fake on this device")
        return signed_weight(quantized, weight.bits, segment_size, padded_width(segment_size), packed=weight.bits <= 4)

    def quantized(self, variant: Variant, x: Tensor, before: Before, div: Tensor | None) -> ops.Quantized:
        spec, weight = variant.scheme.activation, _weight(variant)
        assert spec is not None
        x, before, div, grid = ranged(variant, x, before, div)
        ranges = 1 if spec.group_size is None else weight.in_features // spec.group_size
        return ops.quantize(
            x, weight.size, padded_width(weight.size), ranges, spec.bits, spec.symmetric, eps=before.eps,
            mul=before.mul, add=before.add, div=div, grid=grid,
        )  # fmt: skip

    def product(
        self,
        variant: Variant,
        quantized: ops.Quantized,
        x: Tensor,
        bias: Tensor | None,
        after: After = NOTHING_AFTER,
        addend: Tensor | None = None,
    ) -> Tensor:
        out = self.multiplied(
            quantized, _weight(variant), bias, after.dtype or variant.dtype, addend=addend,
            activation=ACTIVATIONS.index(after.activation), gate=after.gate, residual=after.residual,
        )  # fmt: skip
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def same_cut(variant: Variant, first: Variant) -> bool:
        return _weight(variant).size == _weight(first).size

    def load(self) -> None:
        """Defines the operators."""
        ops.load()

    def multiplied(self, *args: Any, **kwargs: Any) -> Tensor:
        """What `ops.arguments` describes."""
        return ops.multiply(*args, **kwargs)


def interpreted_or_absent() -> bool:
    """Whether triton compiles nothing here."""
    try:
        return ops.interpreted()
    except ImportError:
        return True


def why_not() -> str | None:
    """Why the kernels cannot run on this machine, in a few words; None = they can."""
    if not (torch.cuda.is_available() or os.environ.get(INTERPRETER)):
        return NO_DEVICE  # without importing triton, which takes a second and is not quiet at the end of a process
    try:
        interpreted, installed = ops.interpreted(), True
    except ImportError:
        interpreted, installed = False, False
    if interpreted:
        return None
    if not torch.cuda.is_available():
        return NO_DEVICE
    if not installed:
        return "the package triton is not installed (pip install triton)"
    return too_old(CAPABILITY, "int8")


@lru_cache(maxsize=2)
def exact_product(device: str) -> bool:
    """Whether the kernels find `fake`'s codes of a few extreme rows, and add up products of the largest exactly.

    A driver or compiler that breaks them is found so at load, before samples are made of it.
    """
    token = QuantSpec(8, False, "token")
    x_MC = torch.linspace(-1, 1, PROBED[1], device=device).repeat(PROBED[0], 1)
    x_MC[::2, :] = 3.0  # its largest code alone
    found = ops.quantize(x_MC, PROBED[1], padded_width(PROBED[1]), 1, token.bits, token.symmetric)
    wanted = quantize_activation(x_MC, token, None)
    if not torch.equal(found.codes[0, :, : PROBED[1]].to(torch.int16) + 128, wanted.codes.to(torch.int16)):
        return False
    rows_MC = (wanted.codes.double() - wanted.zero_point.double()) * wanted.scale.double()
    return all(_multiplies_exactly(found, rows_MC, bits, tile) for bits in (8, 4) for tile in PROBED_CUTS)


def _multiplies_exactly(found: ops.Quantized, rows_MC: Tensor, bits: int, tile: Tile) -> bool:
    """With a weight of the smallest and largest codes; rows_MC: what `found` stands for, float64."""
    codes_OC = torch.full((PROBED[2], PROBED[1]), 2**bits - 1, dtype=torch.uint8, device=rows_MC.device)
    codes_OC[::2] = 0
    quantized = QuantizedWeight(codes_OC, torch.ones(PROBED[2], 1, device=rows_MC.device), None)
    held = signed_weight(quantized, bits, PROBED[1], padded_width(PROBED[1]), packed=bits <= 4)
    weight_OC = codes_OC.double() - 2 ** (bits - 1)
    y_MO, size_MO = rows_MC @ weight_OC.T, rows_MC.abs() @ weight_OC.abs().T
    error = (ops.multiply(found, held, None, torch.float32, tile=tile).double() - y_MO).abs()
    return bool((error <= 2.0**-20 * size_MO).all())


@cache
def tell_of_assembler() -> None:
    """Once, where triton takes an assembler for this GPU that is known for wrong kernels."""
    doubt = None if interpreted_or_absent() else assembler_doubt()
    if doubt is not None:
        logger.warning("%s", doubt)


def assembler_doubt() -> str | None:
    """What may be wrong with triton's assembler on this machine's GPU, and what to do; None = nothing is known."""
    if not torch.cuda.is_available() or torch.version.hip is not None or torch.cuda.get_device_capability() != HOPPER:
        return None
    used, other = ops.load().assemblers(10 * HOPPER[0] + HOPPER[1])
    if _version(used.version) >= ASSEMBLER:
        return None
    newer = _version(other.version) >= ASSEMBLER
    remedy = f"TRITON_PTXAS_PATH={other.path}" if newer else f"TRITON_PTXAS_PATH, a ptxas of CUDA {_dotted(ASSEMBLER)}"
    return (
        f"triton assembles with ptxas {used.version}, which before {_dotted(ASSEMBLER)} got kernels of sm_90 wrong: "
        "numbers, which are refused here, or an illegal memory access, which ends the process. "
        f"Set {remedy} (it takes a driver of CUDA {ASSEMBLER[0]})."
    )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def too_old(least: tuple[int, int], what: str) -> str | None:
    """Why this CUDA device multiplies no `what`, which takes a compute capability of `least`; None = it does."""
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is not None or capability >= least:
        return None
    name = torch.cuda.get_device_name()
    return f"{name} has compute capability {_dotted(capability)}, and {what} products take {_dotted(least)}"


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _weight(variant: Variant) -> SignedWeight:
    return cast(SignedWeight, variant.held)
