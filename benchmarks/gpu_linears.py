"""One Linear on a GPU: what multiplies it in bfloat16, in the rivals' formats and in ours, quantization included."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from viditq.quant import LayerScheme, QuantSpec, get_backend
from viditq.quant.execution.variant import Variant
from viditq.quant.methods.transforms import Chain, Smooth

Call = Callable[[], Tensor]
Compile = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]
WIDTHS = [(1152, 1152), (1152, 4608), (3072, 12288)]
ROWS = [8192, 1024, 4096, 32768]  # the one that rivals are compared at comes first
TINY_WIDTHS, TINY_ROWS = [(64, 96)], [40, 8]
TOKEN, SYMMETRIC = QuantSpec(8, False, "token", None, True), QuantSpec(8, True, "token", None, True)
OURS = {
    "W8A8": (QuantSpec(8, False, "channel"), TOKEN),
    "W8A8 symmetric": (QuantSpec(8, True, "channel"), SYMMETRIC),
    "W4A8": (QuantSpec(4, False, "channel"), TOKEN),
    "W4A8, groups of 64": (QuantSpec(4, False, "group", 64), TOKEN),
}
FP8 = QuantSpec(8, True, "channel", number="e4m3"), QuantSpec(8, True, "token", dynamic=True, number="e4m3")
FP8_BACKEND = "scaled_mm"  # which `cuda` takes too, and which a dry run can go through


def calls(
    rows: int, width: int, outs: int, device: str, backend: str, compiled: Compile | None
) -> Iterator[tuple[str, Callable[[], Call]]]:
    """Name -> what makes a call; compiled: how rivals are compiled, None = without the rivals."""
    x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    linear = nn.Linear(width, outs, device=device, dtype=torch.bfloat16).requires_grad_(False)
    yield "bf16", lambda: lambda: linear(x)
    for name, specs in OURS.items():
        yield f"ours {name}", lambda specs=specs: _ours(linear, x, specs, backend, Chain())  # type: ignore[misc]
    smooth = Chain([Smooth(torch.rand(width, device=device) + 0.5)])
    yield "ours W8A8, smoothed", lambda: _ours(linear, x, OURS["W8A8"], backend, smooth)
    yield "ours FP8", lambda: _ours(linear, x, FP8, FP8_BACKEND, Chain())
    yield "ours FP8, smoothed", lambda: _ours(linear, x, FP8, FP8_BACKEND, smooth)
    if compiled is not None:
        yield "ours FP8, compiled", lambda: _ours(linear, x, FP8, FP8_BACKEND, Chain(), compiled)
        yield "torchao int8, compiled", lambda: _torchao(linear, x, "int8", compiled)
        yield "torchao fp8, compiled", lambda: _torchao(linear, x, "fp8", compiled)
        yield "comfy-kitchen int8_linear", lambda: _kitchen(linear, x)


def _ours(
    linear: nn.Linear,
    x: Tensor,
    specs: tuple[QuantSpec, QuantSpec],
    backend: str,
    chain: Chain,
    compiled: Compile = lambda call: call,
) -> Call:
    variant = Variant.fit(LayerScheme(*specs), linear.weight, chain)
    chosen = get_backend(backend).resolve(variant.scheme)
    chosen.prepare(variant)
    run = compiled(lambda rows: chosen.linear(variant, rows, linear.bias))
    return lambda: run(x)


def torchao_quantized(module: nn.Module, kind: str, chosen: Callable[[nn.Module, str], bool]) -> nn.Module:
    """torchao's dynamic quantization per row, in place; kind: int8 or fp8. Raises ImportError without it."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    fp8 = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    quantize_(module, Int8DynamicActivationInt8WeightConfig() if kind == "int8" else fp8, filter_fn=chosen)
    return module


def _torchao(linear: nn.Linear, x: Tensor, kind: str, compiled: Compile) -> Call:
    copied = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, device=x.device, dtype=x.dtype))
    copied.load_state_dict({f"0.{key}": value for key, value in linear.state_dict().items()})
    run = compiled(
        torchao_quantized(copied.requires_grad_(False), kind, lambda module, _: isinstance(module, nn.Linear))
    )
    return lambda: run(x)


def _kitchen(linear: nn.Linear, x: Tensor) -> Call:
    import comfy_kitchen as kitchen

    scale = linear.weight.float().abs().amax(1, keepdim=True) / 127
    codes = (linear.weight.float() / scale).round().to(torch.int8)
    return lambda: kitchen.int8_linear(x, codes, scale, bias=linear.bias, out_dtype=x.dtype)
