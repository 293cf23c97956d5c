"""Our attention (model.attention=native) beside torch's, by shape: time and error.

    OMP_NUM_THREADS=1 python benchmarks/attention.py
    OMP_NUM_THREADS=2 python benchmarks/attention.py --rounds 30

Random inputs, keys with channels far off zero, [B, L, H, D] in memory. Candidates are interleaved in one process in an
order drawn anew each round. Cells are median / 10 % quantile in ms: of the thread's processor time on one thread, which
other processes disturb less, else of the time that went by. Errors: relative L2 distance from float64, same inputs.
"""

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from viditq.models.native import op

SHAPES_BLHDK = {
    "PixArt-XL, 512 px": (2, 1024, 16, 72, 1024),
    "heads of 64": (2, 1024, 16, 64, 1024),
    "1024 px, 8 heads": (1, 4096, 8, 72, 4096),
    "1024 px, 8 heads of 64": (1, 4096, 8, 64, 4096),
    "heads of 128": (1, 2048, 8, 128, 2048),
    "captions": (2, 1024, 16, 72, 120),
    "captions, masked": (2, 1024, 16, 72, 120),
    "frames": (32, 256, 16, 72, 256),
    "over time": (256, 16, 16, 72, 16),
}


def torchs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """torch's attention on [B, L, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


def candidates(shape: tuple[int, ...], masked: bool) -> dict[str, Callable[[], Tensor]]:
    """Name -> attention of one set of inputs; the first is exact."""
    B, L, H, D, K = shape
    q, k, v = (torch.randn(B, n, H, D) for n in (L, K, K))
    half = (q.bfloat16(), (k + 4 * torch.randn(D)).bfloat16(), v.bfloat16())
    single = (half[0].float(), half[1].float(), half[2].float())
    mask = torch.arange(K) < torch.randint(1, K, (B, 1, 1, 1)) if masked else None
    found: dict[str, Callable[[], Tensor]] = {
        "exact": partial(torchs, half[0].double(), half[1].double(), half[2].double(), mask),
        "torch float32": partial(torchs, *single, mask),
        "torch bfloat16": partial(torchs, *half, mask),
        "ours float32": partial(op.attention, *single, mask),
        "ours bfloat16": partial(op.attention, *half, mask),
    }
    if torch.ops.viditq.attention_amx():
        found["ours bfloat16, no AMX"] = partial(torch.ops.viditq.attention, *half, mask, D**-0.5, False)
    return found


def measure(runs: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, tuple[float, float]]:
    """Name -> median and 10 % quantile in ms."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 2):  # the first two warm up
        for name in random.sample(sorted(runs), len(runs)):
            start = clock()
            runs[name]()
            if i >= 2:
                seconds[name].append(clock() - start)
    return {n: (1e3 * statistics.median(s), 1e3 * statistics.quantiles(s, n=10)[0]) for n, s in seconds.items()}


def processor() -> str:
    """Its name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=SHAPES_BLHDK, default=list(SHAPES_BLHDK), help="shapes")
    args = parser.parse_args()
    op.load()
    torch.manual_seed(0)
    amx = "with" if torch.ops.viditq.attention_amx() else "without"
    print(
        f"{processor()}, {amx} AMX, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.rounds} rounds"
    )
    print("gain: the faster of torch's over ours in bfloat16, by medians / by 10 % quantiles")
    for name in args.only:
        runs = candidates(SHAPES_BLHDK[name], "masked" in name)
        exact = runs.pop("exact")()
        times = measure(runs, args.rounds)
        print(f"\n{name}: B, L, H, D, K = {SHAPES_BLHDK[name]}")
        for run, (median, low) in times.items():
            error = ((runs[run]().double() - exact).norm() / exact.norm()).item()
            print(f"  {run:22s} {median:8.2f} /{low:8.2f} ms   error {error:.1e}")
        gain = [min(times["torch float32"][i], times["torch bfloat16"][i]) / times["ours bfloat16"][i] for i in (0, 1)]
        print(f"  gain {gain[0]:.2f} / {gain[1]:.2f}")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
