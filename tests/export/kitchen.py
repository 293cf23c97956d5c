"""The same schemes in comfy-kitchen's arithmetic; as a script, with that library installed, it writes the golden file.

pip install comfy-kitchen==0.2.40 packaging && python tests/export/kitchen.py
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from viditq.export.comfy_formats import Marker, Rows, entries, markers
from viditq.quant import Chain, ConvRotSpec, LayerScheme, QuantSpec
from viditq.quant.execution.variant import Variant
from viditq.quant.methods.quantizer import QuantizedWeight

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "comfy_kitchen.safetensors"
OUT, IN, TOKENS = 24, 256, 6
TOKEN = QuantSpec(8, True, "token", dynamic=True)


def scheme(bits: int, granularity: str = "channel", group: int | None = None, rotate: int | None = None) -> LayerScheme:
    """Symmetric on both sides."""
    chain = () if rotate is None else (ConvRotSpec(rotate),)
    return LayerScheme(QuantSpec(bits, True, granularity, group), TOKEN, chain)


SCHEMES: dict[str, LayerScheme] = {
    "int8": scheme(8),
    "int8_tensor": scheme(8, "tensor"),
    "int6": scheme(6),
    "int4": scheme(4),
    **{f"int8_convrot{size}": scheme(8, rotate=size) for size in (16, 64, 256)},
    **{f"int4_convrot{size}": scheme(4, rotate=size) for size in (16, 64, 256)},
    "int3_convrot64": scheme(3, rotate=64),
    "int8_weight_only": LayerScheme(QuantSpec(8, True, "channel"), None),
    "int4_group64_weight_only": LayerScheme(QuantSpec(4, False, "group", 64), None),
    "int4_group64_symmetric_weight_only": LayerScheme(QuantSpec(4, True, "group", 64), None),
    "int4_channel_weight_only": LayerScheme(QuantSpec(4, False, "channel"), None),
    "int3_group32_weight_only": LayerScheme(QuantSpec(3, False, "group", 32), None),
}


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, weight and bias; some channels are loud."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, IN, generator=generator) * torch.logspace(-1, 1, IN)
    return x, torch.randn(OUT, IN, generator=generator) / 16, torch.randn(OUT, generator=generator)


def variant_of(scheme: LayerScheme, weight_OC: Tensor) -> Variant:
    chain = Chain([transform.fit(weight_OC, None, scheme) for transform in scheme.transforms])
    return Variant.fit(scheme, weight_OC, chain)


def exported(variant: Variant, swapped: bool = False) -> tuple[dict[str, Tensor], Marker]:
    """The tensors of a layer in its first format, by the end of their names."""
    spec, quantized = variant.scheme.weight, variant.quantized_weight()
    assert spec is not None and quantized is not None
    marker = markers(variant.scheme, variant.in_features)[0]
    rows = Rows(spec, len(quantized.codes), partial(_same, quantized))
    return {
        e.name.removeprefix("x."): e.make() for e in entries("x", marker, [rows], variant.in_features, swapped)
    }, marker


def _same(quantized: QuantizedWeight) -> QuantizedWeight:
    return quantized


def kitchen_linear(tensors: dict[str, Tensor], marker: Marker, x: Tensor, bias: Tensor | None) -> Tensor:
    """What comfy-kitchen's eager backend makes of a layer, in float32."""
    import comfy_kitchen as ck

    out: Any
    with ck.use_backend("eager"):
        if marker["format"] == "int8_tensorwise":
            weight, scale = tensors["weight"], tensors["weight_scale"]
            if marker.get("full_precision_matrix_mult"):
                return F.linear(x, weight.float() * scale, bias)
            rotation = {key: value for key, value in marker.items() if key.startswith("convrot")}
            out = ck.int8_linear(x, weight, scale, bias, torch.float32, **rotation)
        elif marker["format"] == "asym_w4a8_int8":
            sizes = {key: marker[key] for key in ("group_size", "convrot_groupsize")}
            scales = (tensors["weight_s_rel"], tensors["weight_s_channel"])
            out = ck.w4a8_int8_linear(x, tensors["weight"], *scales, bias=bias, out_dtype=torch.float32, **sizes)
        else:
            out = ck.gemv_awq_w4a16(
                x, tensors["weight"], tensors["weight_scale"], tensors["weight_zeros"], bias, marker["group_size"]
            )
    return out.float()


def main() -> None:
    x, weight_OC, bias = problem()
    golden = {"x": x, "weight": weight_OC, "bias": bias}
    told = {}
    for name, of in SCHEMES.items():
        tensors, told[name] = exported(variant_of(of, weight_OC))
        golden |= {f"{name}.{field}": tensor.contiguous() for field, tensor in tensors.items()}
        golden[f"{name}.output"] = kitchen_linear(tensors, told[name], x, bias)
    GOLDEN.parent.mkdir(exist_ok=True)
    save_file(golden, GOLDEN, metadata={"markers": json.dumps(told), "library": "comfy-kitchen 0.2.40, eager"})


if __name__ == "__main__":
    main()
