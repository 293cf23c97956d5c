"""What ComfyUI's formats of a quantized Linear hold exactly, and their tensors.

* int8_tensorwise: W = code * scale, activations quantized by token, symmetric; behind ConvRot's rotation where the
  marker says convrot. With full_precision_matrix_mult the activations stay in float.
* asym_w4a8_int8: 4 bits a weight, W = round((code - 8) s_rel) s_channel, always behind ConvRot's rotation.
* awq_w4a16: 4 bits a weight, W = (code - 8) scale + zeros by groups of inputs; activations in float.

Legend: N outputs, K inputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from viditq.export.part import Entry
from viditq.export.refusal import Refusal
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.methods.quantizer import QuantizedWeight
from viditq.quant.methods.transforms import ConvRotSpec
from viditq.quant.numerics.packing import pack

Marker = dict[str, Any]
INT8, W4A8, AWQ = "int8_tensorwise", "asym_w4a8_int8", "awq_w4a16"
W4A8_GROUP = 16  # inputs that share an s_rel, as the kernels have it
S_REL = 8.0  # 4-bit codes become int8 ones of this many; 16 would take -8 to -128, which is cut off
AWQ_GROUPS = (64, 32, 16)
F32 = torch.float32
BY_ROW = ("channel", "tensor")


class Rows(NamedTuple):
    """Some rows of a weight: read gives their codes and grid."""

    spec: QuantSpec
    out_features: int
    read: Callable[[], QuantizedWeight]


def refusal(scheme: LayerScheme, layer: str) -> Refusal | None:
    """Why none of the formats holds this scheme, whatever the layer's shape; None where one does."""
    wrong = _wrong_field(scheme)
    if wrong is None:
        return None
    field, why = wrong
    value: object = scheme
    for part in field.split("."):
        value = getattr(value, part)
    if field == "transforms":
        value = [transform.name for transform in scheme.transforms]
    return Refusal(layer, field, value, why, nearest(scheme))


def nearest(scheme: LayerScheme) -> str:
    """The settings of the nearest scheme that a format holds."""
    few = scheme.weight is not None and scheme.weight.bits <= 4
    if scheme.activation is None:
        return "quant=w4 quant/smoothing=none" if few else "quant=w8a8_sym"
    return "quant=w4a8_sym quant/smoothing=convrot" if few else "quant=w8a8_sym, or with quant/smoothing=convrot"


def _wrong_field(scheme: LayerScheme) -> tuple[str, str] | None:
    weight, activation = scheme.weight, scheme.activation
    rotated = [isinstance(transform, ConvRotSpec) for transform in scheme.transforms]
    if weight is None:
        return "weight", "and a weight in float cannot meet quantized activations there"
    if scheme.low_rank is not None:
        return "low_rank", "and no branch in 16 bits is read beside int8 codes"
    if rotated not in ([], [True]):
        return "transforms", "and only ConvRot's rotation is known there, no scale of inputs"
    if activation is None:
        return _wrong_weight_only(weight, bool(rotated))
    if not activation.dynamic:
        return "activation.dynamic", "and activations take their scale from the token itself"
    if activation.granularity != "token":
        return "activation.granularity", "and activations have one scale a token"
    if not activation.symmetric:
        return "activation.symmetric", "and activations have no zero point"
    if activation.full_range:
        return "activation.full_range", "and activations are the largest over 127"
    if activation.bits != 8:
        return "activation.bits", "and activations get 8 bits"
    if not weight.symmetric:
        return "weight.symmetric", "and these weights have no zero point"
    if weight.granularity not in BY_ROW:
        return "weight.granularity", "and weights have one scale a row beside quantized activations"
    return None


def _wrong_weight_only(weight: QuantSpec, rotated: bool) -> tuple[str, str] | None:
    if rotated:
        return "transforms", "and nothing is rotated where activations stay in float"
    if weight.bits > 4 and not weight.symmetric:
        return "weight.symmetric", "and weights of more than 4 bits have no zero point"
    if weight.bits > 4 and weight.granularity not in BY_ROW:
        return "weight.granularity", "and weights of more than 4 bits have one scale a row"
    return None


def markers(scheme: LayerScheme, in_features: int) -> list[Marker]:
    """The formats that hold a scheme without a `refusal`, as their markers, the smallest first."""
    weight = scheme.weight
    assert weight is not None
    if scheme.activation is None:
        size = _awq_group(weight, in_features)
        packed = [{"format": AWQ, "group_size": size}] if weight.bits <= 4 and size is not None else []
        by_row = weight.symmetric and weight.granularity in BY_ROW
        return packed + ([{"format": INT8, "full_precision_matrix_mult": True}] if by_row else [])
    if not scheme.transforms:
        return [{"format": INT8}]
    (rotation,) = scheme.transforms
    assert isinstance(rotation, ConvRotSpec)
    size = rotation.group_of(in_features)
    packed = [{"format": W4A8, "group_size": W4A8_GROUP, "convrot_groupsize": size}] if weight.bits <= 4 else []
    return [*packed, {"format": INT8, "convrot": True, "convrot_groupsize": size}]


def common_marker(offered: Sequence[Sequence[Marker]]) -> Marker | None:
    """The first that all parts of one tensor have."""
    return next((m for m in offered[0] if all(m in others for others in offered[1:])), None)


def _awq_group(weight: QuantSpec, in_features: int) -> int | None:
    """Inputs that share a scale in the file; None where none of its groups fits."""
    if weight.group_size is not None:
        return weight.group_size if in_features % 2 == 0 else None
    return next((size for size in AWQ_GROUPS if in_features % size == 0), None)


def entries(prefix: str, marker: Marker, parts: Sequence[Rows], in_features: int, swapped: bool) -> list[Entry]:
    """The tensors of one Linear `prefix` but its bias; parts: its rows in turn; swapped: their halves change places."""
    n, kind = sum(part.out_features for part in parts), marker["format"]
    groups = in_features // marker.get("group_size", in_features)

    def entry(name: str, dtype: torch.dtype, shape: tuple[int, ...], of: Callable[[Rows], Tensor]) -> Entry:
        return Entry(f"{prefix}.{name}", dtype, shape, partial(_together, parts, swapped, of))

    if kind == INT8:
        return [entry("weight", torch.int8, (n, in_features), _signed), entry("weight_scale", F32, (n, 1), _row_scale)]
    codes = entry("weight", torch.int8, (n, in_features // 2), _signed_nibbles if kind == W4A8 else _nibbles)
    if kind == W4A8:
        s_rel = entry("weight_s_rel", torch.float8_e4m3fn, (n, groups), partial(_s_rel, groups=groups))
        return [codes, s_rel, entry("weight_s_channel", F32, (n,), _s_channel)]
    scale, zeros = (
        entry(name, F32, (n, groups), partial(_by_group, groups=groups, of=of))
        for name, of in (("weight_scale", _scale), ("weight_zeros", _zeros))
    )
    return [codes, _transposed(scale), _transposed(zeros)]


def _together(parts: Sequence[Rows], swapped: bool, of: Callable[[Rows], Tensor]) -> Tensor:
    rows = torch.cat([of(part) for part in parts])
    return torch.cat(rows.chunk(2)[::-1]) if swapped else rows


def _transposed(entry: Entry) -> Entry:
    return entry._replace(shape=entry.shape[::-1], make=lambda: entry.make().T.contiguous())


def _middle(spec: QuantSpec) -> int:
    """The code of 0 where there is no zero point."""
    return 2 ** (spec.bits - 1)


def _signed(rows: Rows) -> Tensor:
    return (rows.read().codes.to(torch.int16) - _middle(rows.spec)).to(torch.int8)


def _nibbles(rows: Rows, shift: int = 0) -> Tensor:
    """Even columns in the low nibble."""
    return pack(rows.read().codes + shift, 4).view(torch.int8)


def _signed_nibbles(rows: Rows) -> Tensor:
    """The same with 8 for 0, whatever the bits."""
    return _nibbles(rows, 8 - _middle(rows.spec))


def _scale(rows: Rows) -> Tensor:
    return rows.read().scale.float()


def _row_scale(rows: Rows) -> Tensor:
    return _scale(rows).expand(rows.out_features, 1)


def _s_rel(rows: Rows, groups: int) -> Tensor:
    return torch.full((rows.out_features, groups), S_REL).to(torch.float8_e4m3fn)


def _s_channel(rows: Rows) -> Tensor:
    return (_scale(rows) / S_REL).flatten().expand(rows.out_features)


def _zeros(rows: Rows) -> Tensor:
    quantized = rows.read()
    zero = quantized.scale.new_full((), _middle(rows.spec)) if quantized.zero_point is None else quantized.zero_point
    return (8 - zero.float()) * quantized.scale.float()


def _by_group(rows: Rows, groups: int, of: Callable[[Rows], Tensor]) -> Tensor:
    """[N, G] of a scale in whichever shape it is stored."""
    values = of(rows)
    values_NG = values.reshape(len(values), -1)
    return values_NG.repeat_interleave(groups // values_NG.shape[1], 1).expand(rows.out_features, groups)
