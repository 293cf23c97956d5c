"""A denoiser's folder as diffusers saves it with torchao: its tensors describe themselves in the headers of its files.

`Int8Tensor` and `IntxUnpackedToInt8Tensor` in the layout of torchao 0.18 (`torchao.prototype.safetensors`) become our
schemes; torchao itself is not needed. What it computes on other grids than ours is refused by name.

Legend: O out_features, C in_features, G groups of a row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.files import read_json, stored_metadata
from viditq.importing.denoiser import ImportedDenoiser, check_names
from viditq.importing.layer import MIDDLE, ImportedLayer, check_fields, check_shape, stored, unsigned
from viditq.mapped import mapped_tensors, release
from viditq.models.weight_files import DIFFUSERS, weight_files
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.execution.model_linears import shapes_of
from viditq.quant.methods.transforms.given_scale import GivenScaleSpec

INT8, INTX = "Int8Tensor", "IntxUnpackedToInt8Tensor"
NAMES, PLAIN = "tensor_names", "Tensor"
MAPPINGS = {  # of activations by token
    "ASYMMETRIC": QuantSpec(8, False, "token", dynamic=True),
    "SYMMETRIC": QuantSpec(8, True, "token", dynamic=True, full_range=True),
}
AGAIN = "download the folder again"


def read_torchao(folder: Path, denoiser: nn.Module) -> ImportedDenoiser:
    """folder: of the denoiser alone. denoiser: as it was built. Raises UserError for what is not exactly a scheme."""
    tensors, described = _stored(folder)
    shapes, owned = shapes_of(denoiser), dict[str, str]()
    layers: dict[str, ImportedLayer] = {}
    for name, told in described.items():
        if not isinstance(told, dict):
            raise UserError(f"{folder} describes {name} as {told!r}, where torchao 0.18 has a mapping; {AGAIN}")
        if told.get("_type") == PLAIN:
            continue
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or layer not in shapes:
            raise UserError(f"{folder} has {name} quantized, which is no weight of a Linear of this model")
        begin = f"{layer}._weight_"
        fields = {n.removeprefix(begin): t for n, t in tensors.items() if n.startswith(begin)}
        owned |= {f"{begin}{field}": name for field in fields}
        try:
            layers[layer] = TorchaoLayer(layer, told, fields, shapes[layer]).imported()
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{layer} is not described as torchao 0.18 does it ({error!r}): {told}") from error
    if not layers:
        raise UserError(f"{folder} holds no quantized layer: it is a float model, which run.py quantizes")
    floats = {name: tensor for name, tensor in tensors.items() if name not in owned}
    names = [*floats, *(f"{layer}.weight" for layer in layers)]
    check_names(names, [*denoiser.state_dict()], f"{type(denoiser).__name__} of torchao")
    return ImportedDenoiser("torchao", layers, floats)


def _stored(folder: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """All tensors of a folder, and what the headers say of each name of the float model."""
    config = read_json(folder / "config.json", AGAIN)
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method != "torchao":
        what = "is not quantized" if method is None else f"is quantized by {method}"
        raise UserError(f"{folder} {what} (its config.json), and not by torchao, whose folders are imported")
    files = weight_files(folder, DIFFUSERS, None)
    if not files or files[0].suffix != ".safetensors":
        raise UserError(
            f"{folder} holds no safetensors file of a denoiser. What torchao saved as .bin is a pickle, which is not "
            "opened: save it anew with safe_serialization=True (torchao 0.18)."
        )
    tensors: dict[str, Tensor] = {}
    described: dict[str, dict[str, Any]] = {}
    for file in files:
        try:
            tensors |= mapped_tensors(file)
            told = stored_metadata(file)
            described |= {name: json.loads(told[name]) for name in json.loads(told.get(NAMES, "[]")) if name in told}
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{file} is truncated, or its header is damaged ({error}); {AGAIN}") from error
    return tensors, described


@dataclass(frozen=True)
class TorchaoLayer:
    """A weight as its header describes it. fields: by torchao's names. shape: (O, C) that the model has."""

    name: str
    described: Mapping[str, Any]
    fields: Mapping[str, Tensor]
    shape: tuple[int, int]

    def imported(self) -> ImportedLayer:
        """Raises UserError where torchao computes something else than any of our schemes."""
        kind = self.described.get("_type")
        if kind not in (INT8, INTX):
            raise UserError(
                f"{self.name} is torchao's {kind}; imported are {INT8} and {INTX}, whose codes are integers"
            )
        optional = ("act_pre_scale", "zero_point") if kind == INT8 else ()
        needed = ("qdata", "scale") if kind == INT8 else ("qdata", "scale", "zero_point")
        if "act_quant_scale" in self.fields:
            self._refuse("act_quant_scale", "a number", "a range of activations set beforehand")
        check_fields(f"{self.name}._weight", {**self.fields}, needed, optional)
        check_shape(f"{self.name}.weight", self.fields["qdata"], [self.shape])
        layer = self._int8() if kind == INT8 else self._intx()
        release(layer.sources)
        return layer

    def _refuse(self, field: str, value: object, why: str) -> NoReturn:
        raise UserError(f"{self.name} has {field}={value!r} in torchao's description, {why}; it is not imported")

    def _data(self, key: str) -> Any:
        """A value of the description, without the names of its classes."""
        return _plain(self.described.get("_data", {}).get(key))

    def _weight(self, bits: int, symmetric: bool) -> tuple[QuantSpec, int]:
        """The weight's format, and how many groups a row has."""
        (rows, columns), block = self.shape, self._data("block_size")
        if block == [rows, columns] and rows > 1:
            return QuantSpec(bits, symmetric, "tensor"), 1
        sizes = isinstance(block, list) and len(block) == 2 and block[0] == 1 and isinstance(block[1], int)
        if not sizes or not 0 < block[1] <= columns or columns % block[1]:
            self._refuse("block_size", block, f"which parts {rows} x {columns} weights neither by row nor by group")
        if block[1] == columns:
            return QuantSpec(bits, symmetric, "channel"), 1
        return QuantSpec(bits, symmetric, "group", block[1]), columns // block[1]

    def _int8(self) -> ImportedLayer:
        """Whose product leaves zero points of weights out: only symmetric ones are what they seem."""
        zero_point = self.fields.get("zero_point")
        if zero_point is not None and zero_point.count_nonzero():
            self._refuse(
                "zero_point", "not 0", "which its own integer product leaves out, so that it is not clear what is meant"
            )
        if self._data("reduce_range"):
            self._refuse("reduce_range", True, "which narrows the codes")
        spec, groups = self._weight(8, True)
        smooth = self.fields.get("act_pre_scale")
        if smooth is not None:
            check_shape(f"{self.name}._weight_act_pre_scale", smooth, [(self.shape[1],)])
        scheme = LayerScheme(spec, self._activation(), () if smooth is None else (GivenScaleSpec(),))
        return self._made(scheme, groups, None, smooth)

    def _activation(self) -> QuantSpec | None:
        """Of an Int8Tensor."""
        told = self._data("act_quant_kwargs")
        if told is None:
            return None
        mapping = told.get("mapping_type")
        if mapping not in MAPPINGS:
            self._refuse("act_quant_kwargs.mapping_type", mapping, f"where {' and '.join(MAPPINGS)} are imported")
        if told.get("reduce_range"):
            self._refuse("act_quant_kwargs.reduce_range", True, "which narrows the codes")
        granularity = self.described["_data"]["act_quant_kwargs"]["_data"].get("granularity") or {}
        if granularity.get("_type") != "PerRow" or _plain(granularity).get("dim", -1) != -1:
            why = "where activations have a scale per token"
            self._refuse("act_quant_kwargs.granularity", granularity.get("_type"), why)
        return MAPPINGS[mapping]

    def _intx(self) -> ImportedLayer:
        target, activation = str(self._data("target_dtype")), self._data("activation_quantization")
        bits = int(target.removeprefix("int")) if target in {f"int{b}" for b in MIDDLE} else 0
        if not bits:
            self._refuse("target_dtype", target, "where int2 to int8 are imported")
        if activation not in (None, "int8_asym_per_token"):
            self._refuse("activation_quantization", activation, "where int8_asym_per_token is imported")
        zero_point = self.fields["zero_point"]
        spec, groups = self._weight(bits, not zero_point.count_nonzero())
        if not spec.symmetric and int(zero_point.amin()) < -MIDDLE[bits]:
            self._refuse("zero_point", int(zero_point.amin()), f"below the smallest code of {bits} bits")
        scheme = LayerScheme(spec, MAPPINGS["ASYMMETRIC"] if activation else None)
        return self._made(scheme, groups, None if spec.symmetric else zero_point, None)

    def _made(
        self, scheme: LayerScheme, groups: int, zero_point: Tensor | None, smooth: Tensor | None
    ) -> ImportedLayer:
        assert scheme.weight is not None
        codes, scale, grid = self.fields["qdata"], self.fields["scale"], self._grid(scheme.weight, groups)
        for name, tensor in {"qdata": codes, "zero_point": zero_point}.items():
            if tensor is not None and tensor.dtype != torch.int8:
                self._refuse(name, str(tensor.dtype).removeprefix("torch."), "where it is int8")
        for name, tensor in {"scale": scale, "zero_point": zero_point}.items():
            if tensor is not None and tensor.numel() != torch.Size(grid).numel():
                check_shape(f"{self.name}._weight_{name}", tensor, [grid])
        read = partial(_read, self.name, scheme.weight.bits, grid, codes, scale, zero_point, smooth)
        return ImportedLayer(scheme, read, [*self.fields.values()])

    def _grid(self, spec: QuantSpec, groups: int) -> tuple[int, ...]:
        """The shape of scales and zero points in a variant."""
        if spec.granularity == "tensor":
            return (1, 1)
        return (self.shape[0], 1) if spec.granularity == "channel" else (self.shape[0], groups, 1)


def _read(
    layer: str,
    bits: int,
    grid: tuple[int, ...],
    codes_OC: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    smooth_C: Tensor | None,
) -> dict[str, Tensor]:
    """Signed codes, counted from the smallest."""
    low, high = (int(codes_OC.amin()), int(codes_OC.amax())) if bits < 8 else (0, 0)
    if low < -MIDDLE[bits] or high >= MIDDLE[bits]:
        raise UserError(f"codes of int{bits} in {layer} reach {low} to {high}: the file is damaged; {AGAIN}")
    zero = None if zero_point is None else unsigned(zero_point, bits).view(grid)
    smooth = {} if smooth_C is None else {"chain.0.scale": 1 / smooth_C.float()}
    return stored(unsigned(codes_OC, bits), bits, scale.reshape(grid), zero) | smooth


def _plain(value: Any) -> Any:
    """{"_type": ..., "_data": x} -> x, all the way down."""
    if isinstance(value, dict):
        return _plain(value["_data"]) if "_data" in value else {k: _plain(v) for k, v in value.items() if k[0] != "_"}
    return [_plain(one) for one in value] if isinstance(value, list) else value
