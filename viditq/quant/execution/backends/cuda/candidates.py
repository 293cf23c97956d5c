"""Ways to compute a product on a GPU: our kernel in several cuts, torch's, and CUTLASS where a package brings it.

comfy-kitchen's int8_linear is none of them: it takes no codes but quantizes activations itself, those in half precision
to others than `fake` (tests/quant/execution/test_kitchen_linear.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from viditq.quant.execution.backends.cuda.choice import Candidate
from viditq.quant.execution.backends.cuda.product import Product, decoded_rows, decoded_weight
from viditq.quant.execution.backends.triton import ops
from viditq.quant.execution.backends.triton.tiles import Tile, tiles_for

INT_MM_ROWS, INT_MM_MULTIPLE = 17, 8
CUTLASS_MULTIPLE = 16
HALVES = (torch.bfloat16, torch.float16)


def candidates_for(product: Product) -> list[Candidate]:
    """All there are, the ones that may not take it included: they say why."""
    tiles = tiles_for(product.shape[0])
    return [
        *(Candidate(f"triton {tile.rows}x{tile.outs}", partial(_by_triton, tile)) for tile in tiles),
        Candidate("torch._int_mm", _by_int_mm, _against_int_mm),
        *(Candidate(name, partial(_by_cutlass, *place), partial(_against_cutlass, *place)) for name, place in CUTLASS),
    ]


CUTLASS: tuple[tuple[str, tuple[str, str]], ...] = (
    ("sglang-kernel", ("sgl_kernel", "int8_scaled_mm")),
    ("vllm", ("vllm._custom_ops", "cutlass_scaled_mm")),
)


def _by_triton(tile: Tile | None, product: Product) -> Tensor:
    x, weight, bias, dtype, addend, activation, gate, residual = product
    return ops.multiply(
        x, weight, bias, dtype, addend=addend, activation=activation, gate=gate, residual=residual, tile=tile
    )


def _by_int_mm(product: Product) -> Tensor:
    x, weight = product.x, product.weight
    exact = torch._int_mm(x.codes[0], weight.data[0].T)
    if not x.symmetric:
        exact -= x.zero * weight.colsum
    if weight.zero_point is not None:
        exact -= (x.rowsum - weight.size * x.zero) * weight.zero_point
    y = exact.float() * (x.scale * weight.scale)
    return product.finished(y if product.bias is None else y + product.bias)


def _against_int_mm(product: Product) -> str | None:
    rows, _, outs = product.shape
    if product.weight.packed:
        return "weights are packed"
    if len(product.weight.scale) > 1:
        return "weights have groups"
    if rows < INT_MM_ROWS:
        return f"fewer than {INT_MM_ROWS} rows"
    return f"{outs} outputs are no multiple of {INT_MM_MULTIPLE}" if outs % INT_MM_MULTIPLE else None


def _by_cutlass(module: str, name: str, product: Product) -> Tensor:
    x, weight = product.x, product.weight
    bias = None if product.bias is None else product.bias.to(product.dtype)
    rows_scale, outs_scale = (x.scale, weight.scale.view(1, -1)) if module != "sgl_kernel" else (
        x.scale.view(-1), weight.scale.view(-1))  # fmt: skip
    y = _function(module, name)(x.codes[0], weight.data[0].T, rows_scale, outs_scale, product.dtype, bias)
    return product.finished(y)


def _against_cutlass(module: str, name: str, product: Product) -> str | None:
    _, _, outs = product.shape
    if not product.is_plain:
        return "it takes no zero points, groups or packed weights"
    if product.dtype not in HALVES:
        return "it answers in half precision only"
    if outs % CUTLASS_MULTIPLE:
        return f"{outs} outputs are no multiple of {CUTLASS_MULTIPLE}"
    if product.x.codes.device.type != "cuda":
        return "it runs on CUDA devices only"
    return None if _installed(module) else "it is not installed"


@cache
def _installed(module: str) -> bool:
    return find_spec(module.split(".")[0]) is not None


@cache
def _function(module: str, name: str) -> Callable[..., Any]:
    return getattr(import_module(module), name)


def _in_float(product: Product) -> Tensor:
    rows, weight = decoded_rows(product.x, product.weight.size), decoded_weight(product.weight)
    y = (rows.float() @ weight.float().mT).sum(0)
    return product.finished(y if product.bias is None else y + product.bias)


LAST = Candidate("emulation", _in_float)
"""Where nothing else is right: decoded anew at every call, slow, and computed in float32."""
