"""What one quantized Linear costs beside the same one in float, every candidate in turn in one process.

    python benchmarks/linears.py                     # one thread, processor time; shapes of PixArt-XL and tiny_video
    python benchmarks/linears.py --threads 2         # wall time
    python benchmarks/linears.py --shapes 1024x1152x4608 --fused

Prints median / 10 % quantile in ms and the ratio of medians to float32. Inputs and weights are random, activations are
quantized per token; each round takes the candidates in an order drawn anew.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from viditq.quant import LayerScheme, QuantSpec
from viditq.quant.execution.backends import Backend, NativeBackend, PortableBackend
from viditq.quant.execution.backends.native import ops
from viditq.quant.execution.backends.native.layout import pack_weight
from viditq.quant.execution.variant import Variant
from viditq.quant.methods.quantizer import quantize_weight
from viditq.quant.methods.transforms import Chain, Smooth

SHAPES = ["256x1152x1152", "1024x1152x1152", "1024x1152x4608", "1024x4608x1152", "256x192x768", "16x1152x1152"]
TOKEN = QuantSpec(8, granularity="token", dynamic=True)
WEIGHTS = {
    "W8A8": QuantSpec(8, granularity="channel"),
    "W4A8": QuantSpec(4, granularity="channel"),
    "W4A8 g64": QuantSpec(4, granularity="group", group_size=64),
}
Candidate = Callable[[], Tensor]


def quantized(backend: Backend, spec: QuantSpec, x: Tensor, weight_OC: Tensor, bias: Tensor, chain: Chain) -> Candidate:
    """One call of a Linear on `backend`, weight packed."""
    variant = Variant.fit(LayerScheme(spec, TOKEN), weight_OC.to(x.dtype), chain)
    backend.prepare(variant)
    return lambda: backend.linear(variant, x, bias)


def candidates(rows: int, in_features: int, out_features: int, fused: bool) -> dict[str, Candidate]:
    """Name -> one call."""
    x, weight_OC, bias = (
        torch.randn(rows, in_features),
        torch.randn(out_features, in_features),
        torch.randn(out_features),
    )
    half = [tensor.bfloat16() for tensor in (x, weight_OC, bias)]
    native, plain = NativeBackend(), Chain()
    out: dict[str, Candidate] = {"float32": lambda: F.linear(x, weight_OC, bias), "bfloat16": lambda: F.linear(*half)}
    for name, spec in WEIGHTS.items():
        out[f"native {name}"] = quantized(native, spec, x, weight_OC, bias, plain)
    out["native W8A8, bfloat16"] = quantized(native, WEIGHTS["W8A8"], half[0], weight_OC, bias, plain)
    out["native W8A8, smoothed"] = quantized(
        native, WEIGHTS["W8A8"], x, weight_OC, bias, Chain([Smooth(torch.rand(in_features) + 0.5)])
    )
    out["portable W8A8"] = quantized(PortableBackend(), WEIGHTS["W8A8"], x, weight_OC, bias, plain)
    if fused:
        out |= fused_candidates(x, weight_OC, bias)
    return out


def fused_candidates(x: Tensor, weight_OC: Tensor, bias: Tensor) -> dict[str, Candidate]:
    """What a block does before and after the product, as own operations around float32 and inside ours."""
    packed = pack_weight(*quantize_weight(weight_OC, WEIGHTS["W8A8"])[:3], 8)
    (rows, width), out_features = x.shape, len(weight_OC)
    mul, add, gate = torch.randn(1, width), torch.randn(1, width), torch.randn(1, out_features)
    residual = torch.randn(rows, out_features)

    def modulated() -> Tensor:
        return F.layer_norm(x, (width,)) * mul + add

    return {
        "float32, LayerNorm, modulate, GELU": lambda: F.gelu(
            F.linear(modulated(), weight_OC, bias), approximate="tanh"
        ),
        "native, LayerNorm, modulate, GELU": lambda: ops.linear(
            x, packed, bias, TOKEN, layernorm_eps=1e-6, mul=mul, add=add, activation="gelu_tanh"
        ),
        "float32, gate, residual": lambda: residual + gate * F.linear(x, weight_OC, bias),
        "native, gate, residual": lambda: ops.linear(x, packed, bias, TOKEN, gate=gate, residual=residual),
    }


def measure(calls: Mapping[str, Candidate], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Name -> seconds of each round, ascending."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name in random.sample(list(calls), len(calls)):
            start = clock()
            calls[name]()
            if round_:  # the first warms up
                seconds[name].append(clock() - start)
    return {name: sorted(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="rows x in_features x out_features")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fused", action="store_true", help="also with what a block does around the product")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    with torch.inference_mode():
        for shape in args.shapes:
            rows, in_features, out_features = map(int, shape.split("x"))
            times = measure(candidates(rows, in_features, out_features, args.fused), args.rounds, clock)
            print(f"\n{shape}, {args.threads} thread(s)")
            base = statistics.median(times["float32"])
            for name, seconds in times.items():
                median, low = statistics.median(seconds), seconds[len(seconds) // 10]
                print(f"  {name:36} {1e3 * median:8.2f} / {1e3 * low:8.2f} ms   {base / median:5.2f}x")


if __name__ == "__main__":
    main()
