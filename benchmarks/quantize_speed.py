"""What quantizing costs: one block of PixArt-XL (1152 channels, 28 blocks), by rounding and range; and rotations.

    python benchmarks/quantize_speed.py                       # one block, times 28
    python benchmarks/quantize_speed.py --blocks 28           # all of them
    python benchmarks/quantize_speed.py --only nearest gptq
    python benchmarks/quantize_speed.py --rotation            # the fast rotation beside a dense product

Random weights and inputs: only the time counts. GPTQ is given its second moments, which calibration makes.
"""

import argparse
import resource
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from viditq.quant import (
    AdaRound,
    Chain,
    Gptq,
    GridFit,
    LayerScheme,
    LpSearch,
    Percentile,
    QuantSpec,
    RotateSpec,
    Variant,
)
from viditq.quant.numerics.hadamard import factor_orders, matrix, random_signs, rotate

WIDTH, NUM_BLOCKS = 1152, 28
LAYERS = [("attention", 8, WIDTH, WIDTH), ("mlp in", 1, 4 * WIDTH, WIDTH), ("mlp out", 1, WIDTH, 4 * WIDTH)]
W4 = QuantSpec(4, granularity="channel")
A8 = QuantSpec(8, granularity="token", dynamic=True)
SCHEMES = {
    "nearest": LayerScheme(W4, A8),
    "nearest, rotated": LayerScheme(W4, A8, (RotateSpec(),)),
    "nearest, groups of 64": LayerScheme(QuantSpec(4, False, "group", 64), A8),
    "percentile": LayerScheme(W4, A8, ranges=Percentile()),
    "lp": LayerScheme(W4, A8, ranges=LpSearch()),
    "grid_fit": LayerScheme(W4, A8, ranges=GridFit()),
    "gptq": LayerScheme(W4, A8, rounding=Gptq()),
    "gptq, rotated": LayerScheme(W4, A8, (RotateSpec(),), Gptq()),
    "low rank 32": LayerScheme(W4, A8, low_rank=32),
    "adaround, 10 of 300 steps": LayerScheme(W4, A8, rounding=AdaRound(10)),
}


def quantize_block(
    scheme: LayerScheme, moments: dict[int, Tensor], weights: list[tuple[int, Tensor]]
) -> tuple[float, float]:
    """Seconds for one block: those that went by, and of processor time, which other processes disturb less."""
    start, busy = time.perf_counter(), time.process_time()
    for count, weight_OC in weights:
        chain = Chain([t.fit(weight_OC, None, scheme) for t in scheme.transforms])
        for _ in range(count):
            made = moments[weight_OC.shape[1]].clone if scheme.needs_moments else None
            Variant.fit(scheme, weight_OC, chain, None, made)
    return time.perf_counter() - start, time.process_time() - busy


def rotations() -> None:
    """Milliseconds for 2,048 rows."""
    print("rotation of 2,048 rows: fast, dense product (ms)")
    for width in (192, 768, 1152, 1536, 3072, 4608):
        x, signs = torch.randn(2048, width), random_signs(width, 0)
        dense = matrix(width).float()
        fast, slow = best_of(partial(rotate, x, signs)), best_of(partial(torch.mm, x, dense))
        a, b = factor_orders(width)
        print(f"  {width:6d} = {a:4d} x {b:4d}   {1000 * fast:8.2f} {1000 * slow:8.2f}")


def best_of(run: Callable[[], object], repeats: int = 5) -> float:
    """The shortest of several runs in seconds, after one that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=[*SCHEMES], metavar="SCHEME")
    parser.add_argument("--rotation", action="store_true")
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads")
    if args.rotation:
        rotations()
        return
    torch.manual_seed(0)
    weights = [(count, torch.randn(out, width) * 0.03) for _, count, out, width in LAYERS]
    rows = {width: torch.randn(8192, width) @ torch.randn(width, width) / width**0.5 for width in (WIDTH, 4 * WIDTH)}
    moments = {width: x.T @ x for width, x in rows.items()}
    rows.clear()
    for name, scheme in SCHEMES.items():
        if not args.only or name in args.only:
            taken = [quantize_block(scheme, moments, weights) for _ in range(args.blocks)]
            mean, busy = (sum(part) / args.blocks for part in zip(*taken, strict=True))
            print(
                f"  {name:28s} {mean:8.2f} s a block   {mean * NUM_BLOCKS:8.1f} s for {NUM_BLOCKS} blocks, "
                f"of processor time {busy * NUM_BLOCKS:8.1f} s",
                flush=True,
            )
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
