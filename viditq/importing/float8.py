"""8-bit floating-point weights: a number times its scale, where the file has one, is the weight.

ComfyUI's files say where scales are in one of two ways: `scaled_fp8` is there and `LAYER.scale_weight` beside a weight,
or a layer is marked (`comfy_quant`, or in the header) as float8_e4m3fn or float8_e5m2 and has `LAYER.weight_scale`.
Without either the numbers are the weights, as programs that cast them to 8 bits leave them. `scale_input` and
`input_scale` are for products in 8 bits, which is not how a float model computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.export.comfy_file import MARKER
from viditq.export.comfy_formats import Marker
from viditq.importing.comfy_layers import FLOATS
from viditq.importing.layer import check_shape
from viditq.importing.origins import Rows
from viditq.mapped import PIECE_BYTES, is_finite, release

FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
FLOAT8 = tuple(FORMATS.values())
KNOWN = ("format", "full_precision_matrix_mult")  # the latter is about the layer's input
SCALED = "scaled_fp8"
OLD, NEW = ("scale_weight", "scale_input"), ("weight_scale", "input_scale")  # of a weight, and of the layer's input


@dataclass(frozen=True)
class Scales:
    """of: name of a weight -> its scale, a number or one for each row. beside: names that are no weights."""

    of: Mapping[str, Tensor] = field(default_factory=dict)
    beside: frozenset[str] = frozenset()


def scales_of(tensors: Mapping[str, Tensor], markers: Mapping[str, Marker]) -> Scales:
    """markers: of layers, all of them 8-bit floating point. Raises UserError for a layer that is not whole."""
    old = [name.removesuffix(f".{OLD[0]}") for name in tensors if name.endswith(f".{OLD[0]}")]
    layers = {**dict.fromkeys(old if SCALED in tensors else (), OLD), **dict.fromkeys(markers, NEW)}
    found = {f"{layer}.weight": _scale(layer, ends[0], tensors) for layer, ends in layers.items()}
    for layer, marker in markers.items():
        if unknown := [key for key in marker if key not in KNOWN]:
            raise UserError(f"{layer} has {unknown[0]}={marker[unknown[0]]!r} in the file, whose meaning is not known.")
        if (dtype := tensors[f"{layer}.weight"].dtype) != FORMATS[marker["format"]]:
            raise UserError(f"{layer} is marked as {marker['format']} and is {str(dtype).removeprefix('torch.')}.")
    _refuse_unsaid(tensors, found)
    found = {n: s for n, s in found.items() if tensors[n].dtype in FLOAT8 or not torch.equal(s, torch.ones_like(s))}
    names = {SCALED, *(f"{layer}.{end}" for layer, ends in layers.items() for end in (*ends, MARKER))}
    return Scales(found, frozenset(names & tensors.keys()))


def _refuse_unsaid(tensors: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> None:
    """Raises UserError where something like a scale lies beside 8-bit numbers, and nothing says that it is one."""
    for name, tensor in tensors.items():
        beside = [f"{name.removesuffix('weight')}{end}" for end in ("scale_weight", "weight_scale", "weight_scale_inv")]
        scale = next((end for end in beside if end in tensors), None)
        if tensor.dtype in FLOAT8 and name not in known and scale is not None:
            raise UserError(
                f"{name} is 8-bit floating-point numbers with {scale} beside them, and nothing in the file says "
                f"how they go together (LAYER.{MARKER}, or {SCALED} with LAYER.scale_weight), so they cannot be read"
            )


def _scale(layer: str, end: str, tensors: Mapping[str, Tensor]) -> Tensor:
    weight, scale = (tensors.get(f"{layer}.{name}") for name in ("weight", end))
    if weight is None or scale is None:
        gone = "weight" if weight is None else end
        raise UserError(f"{layer} is quantized and lacks {layer}.{gone}: the file is not whole; download it again")
    check_shape(f"{layer}.{end}", scale, [(), (1,), (1, 1), (len(weight),), (len(weight), 1)])
    if scale.dtype not in FLOATS or not is_finite(scale):
        raise UserError(f"{layer}.{end} holds no finite numbers ({scale.dtype}); check the file, or download it again")
    return scale


def made(tensor: Tensor, rows: Rows, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """These rows times the scale, as `dtype`: the product in float32, rounded once; some rows at a time."""
    numbers, scale = rows.of(tensor), torch.ones(()) if scale is None else scale.float().flatten()
    if scale.numel() > 1:
        scale = rows.of(scale).view(-1, *[1] * (numbers.ndim - 1))
    out, at_once = torch.empty(numbers.shape, dtype=dtype), max(PIECE_BYTES // max(numbers[:1].numel(), 1), 1)
    for first in range(0, len(numbers), at_once):
        piece = slice(first, first + at_once)
        out[piece] = numbers[piece].float() * (scale[piece] if scale.numel() > 1 else scale)
    release([tensor])
    return out
