"""What integers are worth on a GPU: Linears and whole steps, ours beside bfloat16 and the rivals that are installed.

    python benchmarks/gpu.py --out FOLDER             # one GPU, five minutes; gpu.md and gpu.json
    python benchmarks/gpu.py --dry-run --out FOLDER   # the same code on tiny shapes on a CPU: its figures mean nothing

Weights are random, inputs normal, never zeros. Times are medians by the GPU's own clock after a warm-up, quantization
of activations included; candidates one after another, so that memory is each one's own. A Linear is launched while the
GPU is still busy, and finds nothing of its own in the cache; what the host needs to launch it stands beside. A step
begins on an idle GPU: where its host needs as long as it takes, launches are what it waits for, and the column of CUDA
graphs says what it takes without them. Each table and geometry
has its share of the seconds; what they do not suffice for is left out, as is what is not installed or fails, and the
table says so. Files are written anew after each row, so that a run that is ended early has what it found.
"""

from __future__ import annotations

import argparse
import gc
import logging
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import gpu_linears as linears
import gpu_steps as steps
import torch
from torch import Tensor, nn

from viditq.files import atomic, write_json
from viditq.quant.execution.backends.cuda.choice import AHEAD
from viditq.quant.execution.linear import backend_counts
from viditq.quant.sizes import module_bytes

WARM_UP, REPEATS, REPEATS_OF_STEPS, REPEATS_OF_HOST = 3, 20, 5, 3
SHARE_OF_LINEARS = 0.3  # of the seconds; geometries share the rest
CACHE = 2**28  # bytes that are written between calls, more than any GPU's cache holds
Row = dict[str, Any]


class Bench:
    """One process on one device, which keeps in the folder `out` what it has found so far.

    seconds: after which nothing new is begun.
    """

    def __init__(self, dry_run: bool, seconds: float, out: Path) -> None:
        self.dry_run, self.seconds, self.out = dry_run, seconds, out
        self.end = self.until = time.monotonic() + seconds
        self.device = "cpu" if dry_run else "cuda"
        self.backend = "auto" if dry_run else "cuda"
        self.cache = torch.empty(1 if dry_run else CACHE, dtype=torch.uint8, device=self.device)
        self.results: dict[str, Any] = {"machine": machine(dry_run), "linears": [], "steps": []}
        out.mkdir(parents=True, exist_ok=True)

    def keep(self, table: str, row: Row) -> None:
        """Both files are as if it were the last one."""
        self.results[table].append(row)
        write_json(self.out / "gpu.json", self.results)
        with atomic(self.out / "gpu.md") as file:
            file.write_text("\n".join(self.page()) + "\n")

    def page(self) -> list[str]:
        """gpu.md."""
        found = self.results["machine"]
        lines = [f"# {found['name']}, torch {found['torch']}", ""]
        lines += [*table(self.results["linears"], "shape", "bf16"), ""]
        return lines + table(self.results["steps"], "geometry", "bf16 compiled")

    def compiled(self, module: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(module, backend="eager" if self.dry_run else "inductor")

    def compile_block(self, block: nn.Module) -> None:
        block.compile(backend="eager" if self.dry_run else "inductor")

    def all_linears(self) -> None:
        """A row for each shape and candidate."""
        self.until = time.monotonic() + SHARE_OF_LINEARS * self.seconds
        widths = linears.TINY_WIDTHS if self.dry_run else linears.WIDTHS
        for i, count in enumerate(linears.TINY_ROWS if self.dry_run else linears.ROWS):
            for width, outs in widths:
                shape = f"{count} x {width} x {outs}"
                made = linears.calls(count, width, outs, self.device, self.backend, None if i else self.compiled)
                expected: Tensor | None = None
                for name, make in made:
                    row = self.tried(f"{shape}, {name}", partial(self.of_linear, make))
                    out = row.pop("out", None)
                    expected = out if expected is None else expected
                    self.keep("linears", {"shape": shape, "candidate": name, **row, **_error(out, expected)})

    def all_steps(self, only: list[str]) -> None:
        """A row for each geometry and candidate."""
        wanted = [name for name in steps.GEOMETRIES if not only or any(word in name for word in only)]
        for i, geometry in enumerate(wanted):
            now, build = time.monotonic(), steps.GEOMETRIES[geometry]
            self.until = now + (self.end - now) / (len(wanted) - i)
            if now > self.end:
                self.keep("steps", {"geometry": geometry, "candidate": "all", "left_out": "no time was left"})
                continue
            torch.manual_seed(0)
            with torch.device(self.device):
                model, inputs = build(self.dry_run)
            model = model.to(steps.HALF).eval().requires_grad_(False)
            expected: Tensor | None = None
            for name, make in steps.candidates(model, self.backend, self.compile_block):
                row = self.tried(f"{geometry}, {name}", partial(self.of_step, make, inputs))
                out = row.pop("out", None)
                expected = out if expected is None else expected
                self.keep("steps", {"geometry": geometry, "candidate": name, **row, **_error(out, expected)})
            del model
            self.clean()

    def of_linear(self, make: Callable[[], Callable[[], Tensor]]) -> Row:
        return self.of_call(make(), REPEATS, ahead=True)

    def of_step(self, make: Callable[[], nn.Module], inputs: steps.Inputs) -> Row:
        self.clean()
        model = make()
        weights = module_bytes(model)
        call = steps.call_of(model, inputs, self.device)
        row = self.of_call(call, REPEATS_OF_STEPS, ahead=False) | {"graph_ms": self.in_a_graph(call)}
        return row | {"weight_bytes": weights, "backends": backend_counts(model)}

    def in_a_graph(self, call: Callable[[], Tensor]) -> float | None:
        """Milliseconds of the same recorded in a CUDA graph, which the host launches at once; None: it cannot be."""
        if self.dry_run:
            return None
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            graph.replay()
            return median(self.milliseconds(graph.replay, ahead=False) for _ in range(REPEATS_OF_STEPS))
        except Exception as error:
            print(f"not recorded in a CUDA graph: {type(error).__name__}: {error}", flush=True)
            return None

    def of_call(self, call: Callable[[], Tensor], repeats: int, ahead: bool) -> Row:
        """Milliseconds, those of the host, the first output, and the most that the allocator hands out in a call."""
        start = time.perf_counter()
        out = call()
        self.wait()
        first = time.perf_counter() - start
        for _ in range(1 if self.dry_run else WARM_UP):
            call()
        before = 0 if self.dry_run else torch.cuda.memory_allocated()
        if not self.dry_run:
            torch.cuda.reset_peak_memory_stats()
        times = [self.milliseconds(call, ahead) for _ in range(2 if self.dry_run else repeats)]
        peak = None if self.dry_run else torch.cuda.max_memory_allocated() - before
        host = min(self.milliseconds_of_host(call) for _ in range(REPEATS_OF_HOST))
        times_of = {"ms": median(times), "low": min(times), "host_ms": host, "first_s": first}
        return times_of | {"peak_bytes": peak, "out": out}

    def milliseconds_of_host(self, call: Callable[[], object]) -> float:
        """Until all of it is in the GPU's queue."""
        self.wait()
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    def milliseconds(self, call: Callable[[], object], ahead: bool) -> float:
        """ahead: launched while the GPU is busy, nothing of it in the cache."""
        if self.dry_run:
            return self.milliseconds_of_host(call)
        if ahead:
            self.cache.zero_()
            torch.cuda._sleep(AHEAD)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def tried(self, title: str, work: Callable[[], Row]) -> Row:
        """Its row, or why there is none."""
        if time.monotonic() > min(self.until, self.end):
            return {"left_out": "no time was left"}
        try:
            row = work()
        except ImportError as error:
            return {"left_out": f"not installed ({error.name or error})"}
        except Exception as error:
            lines = str(error).splitlines() or [""]
            return {"left_out": f"{type(error).__name__}: {lines[0][:100]}"}
        finally:
            torch._dynamo.reset()
        print(f"{title}: {row['ms']:.3f} ms", flush=True)
        return row

    def wait(self) -> None:
        if not self.dry_run:
            torch.cuda.synchronize()

    def clean(self) -> None:
        gc.collect()
        if not self.dry_run:
            torch.cuda.empty_cache()


def _error(out: Tensor | None, expected: Tensor | None) -> Row:
    if out is None or expected is None:
        return {}
    return {"relative_error": float((out.float() - expected.float()).norm() / expected.float().norm())}


def machine(dry_run: bool) -> Row:
    name = f"{platform.processor() or platform.machine()}, a dry run" if dry_run else torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "diffusers": diffusers.__version__}
    return {"name": name, **versions, "triton": version("triton") if find_spec("triton") else None}


def table(rows: list[Row], group: str, base: str) -> list[str]:
    """Markdown, ratios to the candidate `base` of the same group."""
    columns = (
        "ms, median / least | host, ms | in a CUDA graph, ms | ratio to " + base + " | weights, MiB | peak, MiB | error"
    )
    lines = [f"| {group} | candidate | {columns} |", f"|{9 * '---|'}"]
    bases = {row[group]: row["ms"] for row in rows if row["candidate"] == base and "ms" in row}
    for row in rows:
        if "ms" not in row:
            lines.append(f"| {row[group]} | {row['candidate']} | not measured: {row['left_out']} | | | | | | |")
            continue
        ratio = f"{bases[row[group]] / row['ms']:.2f}" if row[group] in bases else ""
        graph = f"{row['graph_ms']:.3f}" if row.get("graph_ms") is not None else ""
        sizes = [
            f"{row[key] / 2**20:.1f}" if row.get(key) is not None else "" for key in ("weight_bytes", "peak_bytes")
        ]
        cells = [
            row[group],
            row["candidate"],
            f"{row['ms']:.3f} / {row['low']:.3f}",
            f"{row['host_ms']:.3f}",
            graph,
            ratio,
            *sizes,
        ]
        lines.append(f"| {' | '.join(cells)} | {row.get('relative_error', 0.0):.4f} |")
    return lines


@torch.inference_mode()
def main(arguments: list[str]) -> None:
    """Writes gpu.md and gpu.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.md and gpu.json")
    parser.add_argument("--seconds", type=float, default=290, help="after which nothing new is begun (default 290)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--only", nargs="*", default=[], help="geometries whose names hold one of these words")
    given = parser.parse_args(arguments)
    if not given.dry_run and not torch.cuda.is_available():
        sys.exit("There is no CUDA device. --dry-run goes through the same code on a CPU.")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("viditq").setLevel(logging.INFO)
    bench = Bench(given.dry_run, given.seconds, given.out)
    print(", ".join(f"{key}: {value}" for key, value in bench.results["machine"].items()), flush=True)
    bench.all_linears()
    bench.all_steps(given.only)
    print("\n".join(bench.page()))


if __name__ == "__main__":
    main(sys.argv[1:])
