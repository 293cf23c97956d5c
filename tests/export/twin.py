"""ComfyUI's formats read as they are defined, in float32, without any library but torch.

Legend: N outputs, K inputs, G groups of inputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from viditq.quant.methods.transforms import ConvRot


def marker_of(tensors: Mapping[str, Tensor], layer: str) -> dict[str, Any]:
    return dict(json.loads(bytes(tensors[f"{layer}.comfy_quant"].tolist())))


def _nibbles(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, (packed >> 4) & 15), -1).flatten(1)


def stored_weight(tensors: Mapping[str, Tensor], marker: Mapping[str, Any]) -> Tensor:
    """[N, K] in float32, in the basis of what it is multiplied with."""
    codes = tensors["weight"]
    if marker["format"] == "int8_tensorwise":
        return codes.float() * tensors["weight_scale"]
    codes = _nibbles(codes).float()
    if marker["format"] == "asym_w4a8_int8":
        s_rel = tensors["weight_s_rel"].float().repeat_interleave(marker["group_size"], 1)
        return ((codes - 8) * s_rel).clamp(-127, 127).round() * tensors["weight_s_channel"][:, None]
    scale, zeros = (
        tensors[name].T.repeat_interleave(marker["group_size"], 1) for name in ("weight_scale", "weight_zeros")
    )
    return (codes - 8) * scale + zeros


def comfy_linear(tensors: Mapping[str, Tensor], marker: Mapping[str, Any], x: Tensor, bias: Tensor | None) -> Tensor:
    """[..., K] -> [..., N]."""
    weight = stored_weight(tensors, marker)
    if marker["format"] == "awq_w4a16" or marker.get("full_precision_matrix_mult"):
        return F.linear(x, weight, bias)
    if "convrot_groupsize" in marker:
        x = ConvRot(marker["convrot_groupsize"]).activation(x)
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return F.linear((x / scale).round().clamp(-128, 127) * scale, weight, bias)


def float_weight(tensors: Mapping[str, Tensor], marker: Mapping[str, Any]) -> Tensor:
    """[N, K] that stands for the codes, rotation undone."""
    weight = stored_weight(tensors, marker)
    return ConvRot(marker["convrot_groupsize"]).weight(weight) if "convrot_groupsize" in marker else weight


def fields_of(tensors: Mapping[str, Tensor], layer: str) -> dict[str, Tensor]:
    """A layer's own tensors by the end of their names, but its bias and marker."""
    own = {name.removeprefix(f"{layer}."): t for name, t in tensors.items() if name.startswith(f"{layer}.weight")}
    return {name: tensor for name, tensor in own.items() if "." not in name}
