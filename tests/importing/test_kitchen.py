"""Codes that comfy-kitchen itself made: what we multiply is what it multiplies, where it is installed."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from kitchen import kitchen_linear, problem
from torch import Tensor

from viditq.importing.comfy_layers import ComfyLayer, Rows
from viditq.quant.execution.backends import get_backend
from viditq.quant.execution.variant import empty_variant

MARKERS = {
    "int8": {"format": "int8_tensorwise"},
    "int8_tensor": {"format": "int8_tensorwise"},
    "convrot": {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64},
    "w4a8": {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 64},
    "w4a8_codebook": {"format": "asym_w4a8_int8", "group_size": 32, "convrot_groupsize": 256},
}


def quantized(name: str, weight: Tensor) -> dict[str, Tensor]:
    """By the library's own quantizers."""
    from comfy_kitchen.tensor.int8 import TensorWiseINT8Layout
    from comfy_kitchen.tensor.w4a8_int8 import AsymW4A8Int8Layout

    marker = MARKERS[name]
    if marker["format"] == "int8_tensorwise":
        rotation = {key: value for key, value in marker.items() if key.startswith("convrot")}
        codes, params = TensorWiseINT8Layout.quantize(weight, per_channel=name != "int8_tensor", **rotation)
        return {"weight": codes, "weight_scale": params.scale}
    sizes = {key: marker[key] for key in ("group_size", "convrot_groupsize")}
    codes, params = AsymW4A8Int8Layout.quantize(weight, codebook=name.endswith("codebook"), **sizes)
    assert params.correction is None and (params.codebook is None) != name.endswith("codebook")
    tensors = {"weight": codes, "weight_s_rel": params.scale, "weight_s_channel": params.s_channel}
    return tensors if params.codebook is None else {**tensors, "weight_codebook": params.codebook}


@pytest.mark.parametrize("name", MARKERS)
def test_its_own_files_compute_the_same(name: str) -> None:
    kitchen = pytest.importorskip("comfy_kitchen")
    x, weight, bias = problem()
    fields, marker = quantized(name, weight), MARKERS[name]
    layer = ComfyLayer("x", json.loads(json.dumps(marker)), fields, (len(weight), weight.shape[1]))
    found = layer.parts({"x": Rows(0, len(weight))})["x"]
    variant = empty_variant(found.scheme, weight.shape[1], len(weight), torch.float32)
    variant.load_state_dict(found.tensors("x"), assign=True)
    backend = get_backend("portable")
    backend.prepare(variant)
    codebook = fields.pop("weight_codebook", None)
    if codebook is None:
        theirs = kitchen_linear(fields, marker, x, bias)
    else:
        scales = (fields["weight_s_rel"], fields["weight_s_channel"], codebook)
        with kitchen.use_backend("eager"):
            theirs = kitchen.w4a8_int8_linear(
                *(x, fields["weight"], *scales),
                bias=bias,
                out_dtype=torch.float32,
                group_size=32,
                convrot_groupsize=256,
            )
    error = float((backend.linear(variant, x, bias) - theirs).norm() / theirs.norm())
    assert error <= (0 if name in ("int8", "int8_tensor") else 3e-7)
    plain = F.linear(x, weight, bias)
    assert (theirs - plain).norm() < 0.15 * plain.norm()
