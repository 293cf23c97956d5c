"""Cases of backend equality that integer backends share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from viditq.quant.calibration.context import StepContext
from viditq.quant.description.scheme import LayerScheme, QuantSpec
from viditq.quant.execution.backends import Backend
from viditq.quant.execution.linear import QuantLinear
from viditq.quant.execution.variant import Variant
from viditq.quant.methods.quantizer import dequantize_weight, fake_quantize_activation, static_qparams
from viditq.quant.methods.transforms import Chain, ConvRot, Rotate, Smooth
from viditq.quant.numerics.hadamard import random_signs

FORMATS = Path(__file__).parents[3] / "conf/quant/format"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the sum over k of |x_k w_k|: what rounding of the scales' product and of the sums over segments may cost.
RELATIVE = 2.0**-20


def formats() -> dict[str, QuantSpec]:
    """Every format of conf/quant/format, and what they leave out: other bits, symmetric groups, static groups."""
    read = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(FORMATS.glob("*.yaml"))}
    specs = {name: QuantSpec(**{k: v for k, v in fields.items() if k != "_target_"}) for name, fields in read.items()}
    for bits, symmetric in itertools.product((2, 3, 5, 7), (False, True)):
        specs[f"int{bits}_channel_{symmetric}"] = QuantSpec(bits, symmetric, "channel")
        specs[f"int{bits}_token_{symmetric}"] = QuantSpec(bits, symmetric, "token", dynamic=True)
    specs["int8_group32_symmetric"] = QuantSpec(8, True, "group", 32)
    specs["int4_token_group32_symmetric"] = QuantSpec(4, True, "group", 32, dynamic=True)
    return specs


def weight_formats(floats: bool = False) -> dict[str, QuantSpec]:
    """floats: also those of floating-point numbers, which integers are not multiplied in."""
    kept = {n: s for n, s in formats().items() if floats or not s.is_float}
    return {n: s for n, s in kept.items() if s.granularity in ("tensor", "channel", "group") and not s.dynamic}


def activation_formats() -> dict[str, QuantSpec]:
    """Those that integer backends take."""
    kept = {n: s for n, s in formats().items() if not s.is_float and not s.full_range}
    return {n: s for n, s in kept.items() if s.granularity in ("tensor", "token", "group")}


def variant_of(
    weight: QuantSpec | None,
    activation: QuantSpec | None,
    x: Tensor,
    weight_OC: Tensor,
    chain: Chain | None = None,
    low_rank: int | None = None,
) -> Variant:
    """Fitted to `weight_OC`; the static ranges are those of x."""
    chain, grid = chain or Chain(), None
    if activation is not None and not activation.dynamic:
        rows = chain.activation(x.float()).flatten(0, -2)
        grid = static_qparams(rows.amin(0), rows.amax(0), activation)
    return Variant.fit(LayerScheme(weight, activation, low_rank=low_rank), weight_OC, chain, grid)


def exact_output(variant: Variant, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output in float64 from the codes of `fake`, and sum_k |x_k w_k| beside it."""
    quantized, scheme = variant.quantized_weight(), variant.scheme
    assert quantized is not None and scheme.weight is not None and scheme.activation is not None
    y = variant.chain.activation(x).float()
    on_grid = fake_quantize_activation(y.clone(), scheme.activation, variant.input_qparams).double()
    weight = dequantize_weight(quantized, scheme.weight).double()
    out, size = on_grid @ weight.T, on_grid.abs() @ weight.T.abs()
    if bias is not None:
        out, size = out + bias.double(), size + bias.double().abs()
    if variant.low_rank_up is not None:
        low = y.to(variant.dtype).double() @ variant.low_rank_down.double().T
        branch = low @ variant.low_rank_up.double().T
        out, size = out + branch, size + branch.abs()
    return out, size


def home_of(backend: Backend) -> str:
    """The kind of device that it multiplies on here."""
    return "cuda" if backend.name in ("triton", "cuda") and torch.cuda.is_available() else "cpu"


def assert_agrees(backend: Backend, variant: Variant, x: Tensor, bias: Tensor | None) -> None:
    """Within RELATIVE of sum |x w| and half a unit in the last place of the dtype of float64 on the codes of `fake`."""
    expected, size = exact_output(variant, x, bias)
    home = home_of(backend)
    backend.prepare(variant.to(home))
    before, x, bias = x.clone(), x.to(home), None if bias is None else bias.to(home)
    out = backend.linear(variant, x, bias).cpu()
    assert torch.equal(x.cpu(), before), "x was written to"
    assert out.dtype == variant.dtype and out.shape == expected.shape
    unit = torch.finfo(variant.dtype).eps
    bound = RELATIVE * size + unit * expected.abs() + torch.finfo(variant.dtype).smallest_normal
    if variant.low_rank_up is not None:  # the branch is computed in the layer's dtype
        bound = bound + 4 * unit * size
    error = (out.double() - expected).abs()
    assert (error <= bound).all(), f"{float((error / bound).max()):.2f} times the bound"


def chains(in_features: int) -> Iterator[tuple[str, Chain]]:
    """No transform, each, both, and the other rotation where it divides the width."""
    scale = torch.rand(in_features) + 0.3
    rotate = Rotate(random_signs(in_features, 0))
    yield "none", Chain()
    yield "smooth", Chain([Smooth(scale)])
    yield "rotate", Chain([rotate])
    yield "both", Chain([Smooth(scale), rotate])
    if in_features % 16 == 0:
        yield "convrot", Chain([ConvRot(16 if in_features % 64 else 64)])


def layer_of(variants: Sequence[Variant], backend: Backend, bias: Tensor, device: str = "cpu") -> QuantLinear:
    """A Linear with a variant for each half of the noise levels, ready in the first."""
    context = StepContext((0.0, 0.5, 1.0))
    context.segment = 0
    layer = QuantLinear("layer", nn.Parameter(bias), variants, [0, 1], len(bias), context, backend)
    layer.to(device).prepare()
    return layer


def graphs_of_segments(layer: QuantLinear, x: Tensor) -> list[Any]:
    """What torch.compile makes of `layer` in its two segments, whose outputs it leaves as they are: a graph each."""
    graphs: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    with torch.no_grad():
        compiled = torch.compile(layer, backend=count, fullgraph=True)
        for layer.context.segment in (0, 1, 0):
            assert torch.equal(compiled(x), layer(x))
    assert len(graphs) == 2
    return graphs
