"""A step of the denoiser, quantized and not, side by side in one process: what `backend=auto` is worth on this machine.

    python benchmarks/backends.py                                # every geometry, one thread
    python benchmarks/backends.py pixart stdit --blocks 4 --threads 2
    python benchmarks/backends.py tiny_video --rounds 30 --json out.json

Candidates run in random order each round; a cell is median / 10 % quantile in ms and the ratio of medians to bfloat16
compiled with frozen weights (to fp32 where that is left out). One thread: time of that thread, so that other processes
count less; more: by the clock. Weights are random, inputs normal, never zeros. torchao is compared where installed.
GLIBC_TUNABLES with large mmap and trim thresholds keeps fresh pages out of the figures, of all candidates alike; the
first line says what was set.
"""

import argparse
import copy
import gc
import json
import logging
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from viditq.assets import SHIPPED
from viditq.fusion.install import fuse_blocks
from viditq.models.attention import check_attention, set_attention
from viditq.models.stdit import STDiT
from viditq.provenance import machine as here
from viditq.quant import QuantSpec, Recipe, linear_names, quantize_denoiser
from viditq.quant.sizes import module_bytes

Candidate = Callable[[], Tensor]
BASE = ("bf16 compiled, frozen", "fp32 eager")  # what ratios are to: the first that runs
KEPT_FLOAT = ("norm", "adaln", "caption", "embed", "t_block", "final", "proj_out")


def pixart(blocks: int) -> tuple[nn.Module, dict[str, Any]]:
    """PixArt-XL: 64 x 64 latents (1,024 tokens), two guidance branches, 120 caption tokens."""
    model = diffusers.PixArtTransformer2DModel(
        num_layers=blocks, sample_size=64, caption_channels=4096, use_additional_conditions=False
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 64, 64),
        "encoder_hidden_states": torch.randn(2, 120, 4096),
        "encoder_attention_mask": torch.ones(2, 120),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return model, inputs


def stdit(blocks: int) -> tuple[nn.Module, dict[str, Any]]:
    """STDiT-XL/2: 16 frames of 256 x 256 pixels (256 tokens each), two guidance branches, 120 caption tokens."""
    model = STDiT(sample_size=32, num_frames=16, num_layers=blocks)
    inputs = {
        "hidden_states": torch.randn(2, 4, 16, 32, 32),
        "encoder_hidden_states": torch.randn(2, 120, 4096),
        "encoder_attention_mask": torch.ones(2, 120),
    }
    return model, inputs


def tiny_video(blocks: int) -> tuple[nn.Module, dict[str, Any]]:
    """The shipped model, whole, on two prompts with both guidance branches."""
    model = diffusers.LatteTransformer3DModel.from_pretrained(SHIPPED / "tiny_video" / "transformer").float()
    config = model.config
    inputs = {
        "hidden_states": torch.randn(4, config.in_channels, config.video_length, *[config.sample_size] * 2),
        "encoder_hidden_states": torch.randn(4, 16, config.caption_channels),
    }
    return model, inputs


GEOMETRIES = {"pixart": pixart, "stdit": stdit, "tiny_video": tiny_video}


def quantized(model: nn.Module, weight: QuantSpec, attention: str | None) -> nn.Module:
    """Linears of blocks in integers by backend=auto, blocks fused."""
    names = [name for name in linear_names(model) if "block" in name and not any(k in name for k in KEPT_FLOAT)]
    plan = Recipe(weight, QuantSpec(8, granularity="token", dynamic=True)).resolve(names)
    quantize_denoiser(model, plan, None, "auto", 1000.0)
    set_attention(attention, model)
    fuse_blocks(model)
    return model


def candidates(model: nn.Module, inputs: dict[str, Any], wanted: list[str], small: bool) -> dict[str, tuple[Any, Any]]:
    """Name -> the model and what calls it; `small` models are not worth a compiler to their users."""
    w8, w4 = (QuantSpec(bits, granularity="channel") for bits in (8, 4))
    found: dict[str, tuple[Any, Any]] = {}

    def add(name: str, make: Callable[[], nn.Module], dtype: torch.dtype, compiled: bool = False) -> None:
        if wanted and not any(word in name for word in wanted):
            return
        try:
            made = make().to(dtype) if "ours" not in name else make()
        except ImportError as error:
            print(f"{name}: left out ({error})", flush=True)
            return
        call = torch.compile(made) if compiled else made
        found[name] = (made, call_of(call, inputs, dtype))

    def ours(spec: QuantSpec, attention: str | None, dtype: torch.dtype) -> nn.Module:
        return quantized(copy.deepcopy(model).to(dtype), spec, attention)

    half = torch.bfloat16
    add("fp32 eager", lambda: copy.deepcopy(model), torch.float32)
    add("bf16 eager", lambda: copy.deepcopy(model), half)
    add("bf16 compiled, frozen", lambda: copy.deepcopy(model), half, True)
    add("torchao W8A8 compiled", lambda: torchao_int8(copy.deepcopy(model).to(half)), half, True)
    dtypes = {"fp32": torch.float32, "bf16": half} if small else {"bf16": half}
    native = can_attend()
    for name, dtype in dtypes.items():
        add(f"ours W8A8 {name}", lambda d=dtype: ours(w8, None, d), dtype)  # type: ignore[misc]
        add(f"ours W4A8 {name}", lambda d=dtype: ours(w4, None, d), dtype)  # type: ignore[misc]
        if native:
            add(f"ours W8A8 {name}, own attention", lambda d=dtype: ours(w8, "native", d), dtype)  # type: ignore[misc]
            add(f"ours W4A8 {name}, own attention", lambda d=dtype: ours(w4, "native", d), dtype)  # type: ignore[misc]
    if native and not small:
        add("ours W8A8 bf16, own attention, compiled", lambda: ours(w8, "native", half), half, True)
        add("ours W4A8 bf16, own attention, compiled", lambda: ours(w4, "native", half), half, True)
    return found


def can_attend() -> bool:
    """Whether model.attention=native runs here; says why not."""
    try:
        check_attention("native", "bfloat16")
    except Exception as error:
        print(f"own attention: left out ({error})", flush=True)
        return False
    return True


def torchao_int8(model: nn.Module) -> nn.Module:
    """torchao's dynamic W8A8, on the Linears of blocks."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    def of_blocks(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and "block" in name and not any(k in name for k in KEPT_FLOAT)

    quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=of_blocks)
    return model


def call_of(model: Callable[..., Any], inputs: dict[str, Any], dtype: torch.dtype) -> Candidate:
    batch = len(inputs["hidden_states"])
    given = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    given["timestep"] = torch.full((batch,), 500.0)
    return lambda: model(**given, return_dict=False)[0]


def measure(calls: dict[str, Candidate], rounds: int, one_thread: bool) -> dict[str, list[float]]:
    """Name -> seconds of each round."""
    clock = time.thread_time if one_thread else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in random.sample(list(calls), len(calls)):
            start = clock()
            calls[name]()
            seconds[name].append(clock() - start)
    return seconds


@torch.no_grad()
def run(geometry: str, blocks: int, threads: int, rounds: int, wanted: list[str]) -> dict[str, Any]:
    """The table of one geometry, printed and returned."""
    torch.manual_seed(0)
    model, inputs = GEOMETRIES[geometry](blocks)
    model.eval().requires_grad_(False)
    found = candidates(model, inputs, wanted, small=geometry == "tiny_video")
    expected = call_of(model, inputs, torch.float32)()
    rows: dict[str, Any] = {}
    for name, (made, call) in found.items():
        start = time.perf_counter()
        out = call().float()  # the first call compiles, and checks fused blocks
        rows[name] = {
            "relative_error": float((out - expected).norm() / expected.norm()),
            "first_call": time.perf_counter() - start,
            "weight_bytes": module_bytes(made),
        }
        call()
    del model
    gc.collect()
    seconds = measure({name: call for name, (_, call) in found.items()}, rounds, threads == 1)
    base = next((median(seconds[name]) for name in BASE if name in seconds), None)
    title = f"{geometry}, {blocks} blocks, {threads} thread{'s' if threads > 1 else ''}"
    print(f"\n| {title} | ms, median / 10 % | ratio | weights, MiB | error |\n|---|---|---|---|---|")
    for name, times in seconds.items():
        rows[name] |= {"median": median(times), "low": quantiles(times, n=10)[0]}
        ratio = f"{base / rows[name]['median']:.2f}" if base else ""
        size = rows[name]["weight_bytes"] / 2**20
        cell = f"{1e3 * rows[name]['median']:.1f} / {1e3 * rows[name]['low']:.1f}"
        print(f"| {name} | {cell} | {ratio} | {size:.1f} | {rows[name]['relative_error']:.4f} |", flush=True)
    return {"title": title, "rows": rows}


def main(arguments: list[str]) -> None:
    """Prints a table for each geometry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("geometries", nargs="*", choices=[*GEOMETRIES, []], help="default: all")
    parser.add_argument("--blocks", type=int, default=2, help="of pixart and stdit (default 2)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="*", default=[], help="candidates whose names hold one of these words")
    parser.add_argument("--json", type=Path, help="file for everything that was measured")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("viditq").setLevel(logging.INFO)
    diffusers.utils.logging.disable_progress_bar()
    torch.set_num_threads(given.threads)
    torch._inductor.config.freezing = True  # type: ignore[attr-defined]
    machine = {"cpu": here().cpu, "threads": given.threads, "torch": torch.__version__}
    machine["allocator"] = os.environ.get("GLIBC_TUNABLES", "default")
    print(", ".join(f"{key}: {value}" for key, value in machine.items()), flush=True)
    tables = []
    for geometry in given.geometries or GEOMETRIES:
        tables.append(run(geometry, given.blocks, given.threads, given.rounds, given.only))
        torch._dynamo.reset()
    if given.json is not None:
        given.json.write_text(json.dumps({"machine": machine, "tables": tables}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
