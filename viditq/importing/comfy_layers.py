"""A Linear in one of ComfyUI's integer formats -> scheme and codes; what the formats are: viditq.export.comfy_formats.

* int8_tensorwise: 8-bit codes and scales as they are.
* asym_w4a8_int8: what is multiplied are the integers round((code - 8) s_rel) of 8 bits, or those of a codebook; they
  become the codes, unless s_rel is one power of two in each row, which the scale takes up: then 4 bits remain.
* awq_w4a16: 4-bit codes as they are; zeros have to be (8 - z) scale of a whole number z.

Legend: N outputs, K inputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from viditq.errors import UserError, close_names
from viditq.export.comfy_formats import AWQ, INT8, W4A8, W4A8_GROUP, Marker
from viditq.export.requantize import ACTIVATION
from viditq.importing.layer import MIDDLE, ImportedLayer, check_fields, check_shape, stored, unsigned
from viditq.importing.origins import Rows
from viditq.mapped import release
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.methods.transforms.convrot import GROUP_SIZES, ConvRotSpec
from viditq.quant.numerics.packing import unpack

ROTATED_GROUP, AWQ_GROUP = 256, 64  # where the marker does not say
FIELDS: dict[str, dict[str, tuple[str, ...]]] = {
    INT8: {
        "tensors": ("weight", "weight_scale"),
        "marker": ("convrot", "convrot_groupsize", "full_precision_matrix_mult"),
    },
    W4A8: {"tensors": ("weight", "weight_s_rel", "weight_s_channel"), "marker": ("group_size", "convrot_groupsize")},
    AWQ: {"tensors": ("weight", "weight_scale", "weight_zeros"), "marker": ("group_size",)},
}
CODEBOOK = "weight_codebook"
OTHERS = {
    "float8_e4m3fn": "8-bit floating point",
    "float8_e5m2": "8-bit floating point",
    "mxfp8": "8-bit floating point",
    "nvfp4": "4-bit floating point",
    "convrot_w4a4": "activations of 4 bits on a grid of its own",
    "svdquant_w4a4": "activations of 4 bits on a grid of its own",
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ComfyLayer:
    """A quantized tensor as the file has it. fields: by the ends of their names. shape: (N, K) that the model has."""

    name: str
    marker: Marker
    fields: Mapping[str, Tensor]
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        check_format(self.name, self.marker)
        known = FIELDS[self.kind]
        check_fields(self.name, self.fields, known["tensors"], (CODEBOOK,) if self.kind == W4A8 else ())
        unknown = [key for key in self.marker if key not in ("format", *known["marker"])]
        if unknown:
            self._refuse(unknown[0], self.marker[unknown[0]], f"which {self.kind} is not known to have")

    @property
    def kind(self) -> str:
        """The format's name."""
        return str(self.marker["format"])

    def parts(self, rows: Mapping[str, Rows]) -> dict[str, ImportedLayer]:
        """The Linears that it holds. Raises UserError for shapes and values that none of our schemes stands for."""
        scheme, read = {INT8: self._int8, W4A8: self._w4a8, AWQ: self._awq}[self.kind]()
        sources = [*self.fields.values()]
        release(sources)
        return {layer: ImportedLayer(scheme, partial(read, its), sources) for layer, its in rows.items()}

    def _refuse(self, field: str, value: object, why: str) -> NoReturn:
        raise UserError(f"{self.name} has {field}={value!r} in the file, {why}; such layers are not imported")

    def _check(self, field: str, dtypes: tuple[torch.dtype, ...], *shapes: tuple[int, ...]) -> Tensor:
        tensor, name = self.fields[field], f"{self.name}.{field}"
        if tensor.dtype not in dtypes:
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            self._refuse(field, str(tensor.dtype).removeprefix("torch."), f"where {self.kind} has {allowed}")
        check_shape(name, tensor, shapes)
        return tensor

    def _group(self, key: str, default: int, allowed: tuple[int, ...] | None = None) -> int:
        size = self.marker.get(key, default)
        whole = isinstance(size, int) and not isinstance(size, bool) and size > 0
        if not whole or self.shape[1] % size or (allowed is not None and size not in allowed):
            choices = "" if allowed is None else f" and is one of {', '.join(map(str, sorted(allowed)))}"
            self._refuse(key, size, f"and needs one that divides its {self.shape[1]} inputs{choices}")
        return int(size)

    def _rotation(self) -> ConvRotSpec:
        """Named auto where it is what auto chooses, so that layers of different widths share a scheme."""
        size, auto = self._group("convrot_groupsize", ROTATED_GROUP, GROUP_SIZES), ConvRotSpec()
        return auto if auto.group_of(self.shape[1]) == size else ConvRotSpec(size)

    def _flag(self, key: str) -> bool:
        value = self.marker.get(key, False)
        if not isinstance(value, bool):
            self._refuse(key, value, "and needs true or false")
        return value

    def _int8(self) -> tuple[LayerScheme, Callable[[Rows], dict[str, Tensor]]]:
        n, k = self.shape
        codes = self._check("weight", (torch.int8,), (n, k))
        scale = self._check("weight_scale", FLOATS, (), (1,), (1, 1), (n,), (n, 1))
        by_row = scale.numel() == n and n > 1
        scheme = LayerScheme(
            QuantSpec(8, True, "channel" if by_row else "tensor"),
            None if self._flag("full_precision_matrix_mult") else ACTIVATION,
            (self._rotation(),) if self._flag("convrot") else (),
        )

        def read(rows: Rows) -> dict[str, Tensor]:
            of_rows = rows.of(scale.view(-1, 1)) if by_row else scale.view(1, 1)
            return stored(unsigned(rows.of(codes), 8), 8, of_rows)

        return scheme, read

    def _w4a8(self) -> tuple[LayerScheme, Callable[[Rows], dict[str, Tensor]]]:
        n, k = self.shape
        size = self._group("group_size", W4A8_GROUP)
        packed = self._check("weight", (torch.int8,), (n, k // 2))
        s_rel = self._check("weight_s_rel", (torch.float8_e4m3fn, *FLOATS), (n, k // size))
        s_channel = self._check("weight_s_channel", FLOATS, (n,))
        codebook = self._check(CODEBOOK, FLOATS, (16,)).float() if CODEBOOK in self.fields else None
        even = codebook is None and _is_power_by_row(s_rel)
        scheme = LayerScheme(QuantSpec(4 if even else 8, True, "channel"), ACTIVATION, (self._rotation(),))

        def read(rows: Rows) -> dict[str, Tensor]:
            codes, scale = unpack(rows.of(packed).view(torch.uint8), 4, k), rows.of(s_channel).float()[:, None]
            rel_NG = rows.of(s_rel.view(torch.uint8)).view(s_rel.dtype) if s_rel.itemsize == 1 else rows.of(s_rel)
            if even:
                return stored(codes, 4, scale * rel_NG[:, :1].float())
            values = codes.float() - 8 if codebook is None else codebook[codes.long()]
            integers = (values * rel_NG.float().repeat_interleave(size, 1)).round_().clamp_(-127, 127)
            return stored(unsigned(integers.to(torch.int8), 8), 8, scale)

        return scheme, read

    def _awq(self) -> tuple[LayerScheme, Callable[[Rows], dict[str, Tensor]]]:
        n, k = self.shape
        size = self._group("group_size", AWQ_GROUP)
        packed = self._check("weight", (torch.int8, torch.uint8), (n, k // 2))
        scale_GN = self._check("weight_scale", FLOATS, (k // size, n))
        zeros_GN = self._check("weight_zeros", FLOATS, (k // size, n))
        zero_points = _whole_zero_points(scale_GN, zeros_GN)
        if zero_points is None:
            self._refuse("weight_zeros", "fractions", "which are not (8 - z) scale of whole numbers z from 0 to 255")
        symmetric = bool((zero_points == MIDDLE[4]).all())

        def read(rows: Rows) -> dict[str, Tensor]:
            codes = unpack(rows.of(packed).view(torch.uint8), 4, k)
            zero_point_GN = None if symmetric else _whole_zero_points(scale_GN, zeros_GN)
            zero_point = None if zero_point_GN is None else rows.of(zero_point_GN.T).unsqueeze(-1)
            return stored(codes, 4, rows.of(scale_GN.T).unsqueeze(-1), zero_point)

        return LayerScheme(QuantSpec(4, symmetric, "group", size), None), read


def check_format(layer: str, marker: Mapping[str, Any]) -> None:
    """Raises UserError for a format that is not imported, or not known."""
    name = str(marker.get("format"))
    if name in FIELDS:
        return
    if name in OTHERS:
        why = f"{OTHERS[name]}, which viditq has not"
        raise UserError(f"{layer} is in the format {name}: {why}. Imported are {', '.join(FIELDS)}.")
    raise UserError(f"{layer} is in the format {name!r}, which is not known; {close_names(name, FIELDS)}")


def _is_power_by_row(s_rel_NG: Tensor) -> bool:
    """Whether each row has one s_rel, and it is 1, 2, 4 or 8: code times s_rel is whole then, and within 8 bits."""
    raw = s_rel_NG.view(torch.uint8) if s_rel_NG.itemsize == 1 else s_rel_NG
    first_N = s_rel_NG[:, 0].float()
    whole = torch.isin(first_N, torch.tensor([1.0, 2.0, 4.0, 8.0]))
    return bool(whole.all()) and torch.equal(raw, raw[:, :1].expand_as(raw))


def _whole_zero_points(scale_GN: Tensor, zeros_GN: Tensor) -> Tensor | None:
    """uint8; None where there are others. The file has them times the scale, in its own type."""
    z_GN = (8 - zeros_GN.float() / scale_GN.float()).nan_to_num(8).round_()
    same = torch.equal(((8 - z_GN) * scale_GN.float()).to(zeros_GN.dtype), zeros_GN)
    return z_GN.to(torch.uint8) if same and float(z_GN.amin()) >= 0 and float(z_GN.amax()) <= 255 else None
