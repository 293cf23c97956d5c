"""What models of any size take: peak memory and processor seconds of each command, on random weights of real geometry.

    python benchmarks/size.py flux --blocks 2 38              # FLUX.1: so many single blocks, half as many double ones
    python benchmarks/size.py wan --blocks 2 8 40             # Wan 14B
    python benchmarks/size.py pixart --blocks 28 --tasks quantize load budget --folder /data --keep
    python benchmarks/size.py wan --blocks 2 8 --tasks prompts reference calibrate quantize

The weights are written shard by shard in bfloat16, so that they are never held; text encoders and VAE are tiny. Every
task runs in a process of its own on one thread; its peak is that of the process and its children (ru_maxrss counts
mapped pages too, which the system may take back; `anonymous` is what it may not). A task may be a stage of a run: one
prompt, few tokens and one step, in `trainer.offload=disk`, unless `--overrides` says otherwise; `chain` is all of them
in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODELS: dict[str, dict[str, Any]] = {
    "flux": {
        "model": "flux_dev",
        "pipeline": "images.flux_dev",
        "config": lambda n: {
            "num_layers": max(n // 2, 1),
            "num_single_layers": n,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "axes_dims_rope": [16, 56, 56],
        },
        "blocks": [1, 38],
        "small": ["model.height=256", "model.width=256"],
    },
    "wan": {
        "model": "wan2.1_14b",
        "pipeline": "videos.wan21",
        "config": lambda n: {
            "num_layers": n,
            "num_attention_heads": 40,
            "attention_head_dim": 128,
            "ffn_dim": 13824,
            "freq_dim": 256,
            "rope_max_seq_len": 1024,
        },
        "blocks": [1, 40],
        "small": ["model.height=256", "model.width=256", "model.num_frames=5"],
    },
    "pixart": {
        "model": "pixart_sigma",
        "pipeline": "images.pixart_sigma",
        "config": lambda n: {
            "num_layers": n,
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "cross_attention_dim": 1152,
        },
        "blocks": [28],
        "small": ["model.height=256", "model.width=256"],
    },
}
FORWARDS = ("load", "budget", "unbounded")
TASKS = ("quantize", "load", "budget", "unbounded", "again", "meta")
SHARD = 2 * 10**9
STD = 0.02


def build(name: str, blocks: int, folder: Path) -> None:
    """The pipeline's folder; the denoiser's weights written as they are made."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "models")]
    import torch
    from accelerate import init_empty_weights
    from zoo import images, videos
    from zoo.saving import save

    from viditq.mapped import Writer, header_bound
    from viditq.models.registry import find_class
    from viditq.quant.artifact_writer import in_shards

    spec = MODELS[name]
    module, function = spec["pipeline"].split(".")
    save(getattr({"images": images, "videos": videos}[module], function), folder)
    part = folder / "transformer"
    for file in part.glob("*.safetensors"):
        file.unlink()
    config = json.loads((part / "config.json").read_text()) | spec["config"](blocks)
    (part / "config.json").write_text(json.dumps(config))
    with init_empty_weights(include_buffers=False):
        model = find_class(config["_class_name"]).from_config(config)
    state = model.state_dict()
    shards = in_shards([(n, 2 * t.numel()) for n, t in state.items()], SHARD)
    noise = (torch.randn(2**24 + 1, generator=torch.Generator().manual_seed(0)) * STD).bfloat16()
    weight_map = {}
    for i, names in enumerate(shards):
        file_name = f"diffusion_pytorch_model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        shapes = {n: state[n].shape for n in names}
        bound = header_bound(shapes, sum(2 * state[n].numel() for n in names))
        with Writer(part / file_name, bound) as writer:
            for n in names:
                values = noise.repeat(-(-state[n].numel() // len(noise)))[: state[n].numel()].view(state[n].shape)
                writer.add(n, values + 1 if "norm" in n and n.endswith("weight") and values.ndim == 1 else values)
                weight_map[n] = file_name
    index = {"metadata": {"total_size": sum(2 * t.numel() for t in state.values())}, "weight_map": weight_map}
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    print(json.dumps({"parameters": sum(t.numel() for t in state.values())}))


def overrides(name: str, folder: Path, more: list[str]) -> list[str]:
    """Of every command; a later one of the same key counts."""
    (folder / "prompts.txt").write_text("a small red circle on a white background\na green field\n")
    return [
        *(f"model={MODELS[name]['model']}", f"model.path='{folder / 'model'}'", "quant=w4a8"),
        *("data=prompt_file", f"data.path='{folder / 'prompts.txt'}'", "data.num_prompts=1"),
        *("data.num_calibration_prompts=1", "logger=none", "metric=psnr", "name=size", "batch_size=1"),
        *("model.num_steps=1", "trainer.offload=disk", *MODELS[name]["small"], "noise_floor.num_prompts=0"),
        *(f"cache_dir='{folder / 'cache'}'", f"hydra.run.dir='{folder / 'run'}'"),
        *more,
    ]


def command(task: str, name: str, folder: Path, more: list[str], tokens: int) -> list[str]:
    if task in FORWARDS:
        return [sys.executable, __file__, name, "--folder", str(folder), "--forward", task, "--tokens", str(tokens)]
    run = [sys.executable, str(ROOT / "run.py"), *overrides(name, folder, more)]
    if task == "chain":
        return run
    return [*run, "estimate=meta" if task == "meta" else f"stages=[{'quantize' if task == 'again' else task}]"]


def forward(task: str, name: str, folder: Path, tokens: int) -> None:
    """Load the artifact and call the denoiser once. load: no call; budget: within BUDGET bytes."""
    sys.path[:0] = [str(ROOT)]
    import torch

    from viditq.models.adapter import ModelAdapter
    from viditq.quant.artifact import load_denoiser, read_meta

    quantized = folder / "run" / "quantized"
    adapter = ModelAdapter.from_dict(read_meta(quantized)["model"])
    budget = None if task == "unbounded" else int(float(os.environ.get("BUDGET", "3e8")))
    denoiser = load_denoiser(quantized, adapter.build_denoiser, "auto", budget)[0].eval().requires_grad_(False)
    if task == "load":
        return
    from viditq.fusion.install import fuse_blocks

    fuse_blocks(denoiser)
    torch.manual_seed(0)
    c: Any = denoiser.config
    dtype = adapter.torch_dtype
    if name == "flux":
        inputs = {
            "hidden_states": torch.randn(1, tokens, c.in_channels, dtype=dtype),
            "encoder_hidden_states": torch.randn(1, 128, c.joint_attention_dim, dtype=dtype),
            "pooled_projections": torch.randn(1, c.pooled_projection_dim, dtype=dtype),
            "timestep": torch.tensor([0.5], dtype=dtype),
            "img_ids": torch.zeros(tokens, 3, dtype=dtype),
            "txt_ids": torch.zeros(128, 3, dtype=dtype),
            "guidance": torch.tensor([3.5]),
        }
    elif name == "wan":
        side = max(int((tokens) ** 0.5), 1)
        inputs = {
            "hidden_states": torch.randn(1, 16, 1, 2 * side, 2 * side, dtype=dtype),
            "encoder_hidden_states": torch.randn(1, 128, c.text_dim, dtype=dtype),
            "timestep": torch.tensor([500]),
        }
    else:
        side = max(int(tokens**0.5), 1)
        inputs = {
            "hidden_states": torch.randn(1, 4, 2 * side, 2 * side, dtype=dtype),
            "encoder_hidden_states": torch.randn(1, 128, c.caption_channels, dtype=dtype),
            "timestep": torch.tensor([500]),
        }
    start = time.process_time()
    with torch.inference_mode():
        out = denoiser(**inputs, return_dict=False)[0]
    print(json.dumps({"forward": time.process_time() - start, "sum": float(out.double().sum())}), flush=True)


def measured(argv: list[str], cwd: Path) -> dict[str, Any]:
    """Processor seconds, peak resident bytes, peak anonymous bytes, and the last lines."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(argv, cwd=cwd, env=env, stdout=out, stderr=subprocess.STDOUT, text=True)
        peaks: list[int] = [0]
        stop = threading.Event()
        threading.Thread(target=lambda: _watch(process.pid, peaks, stop), daemon=True).start()
        _, status, usage = os.wait4(process.pid, 0)
        stop.set()
        out.seek(0)
        lines = out.read().strip().splitlines()
    if status:
        raise SystemExit("\n".join([f"{' '.join(argv)} failed:", *lines[-15:]]))
    seconds = usage.ru_utime + usage.ru_stime
    return {"cpu": seconds, "rss": usage.ru_maxrss * 1024, "anon": peaks[0], "lines": lines}


def chain(argv: list[str], cwd: Path) -> Iterator[str]:
    """A whole run as one process: a row for each stage as it ends, the first with Python and its libraries."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(argv, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    before, peaks, stop, said = 0.0, [0], threading.Event(), []
    threading.Thread(target=lambda: _watch(process.pid, peaks, stop), daemon=True).start()
    for line in process.stdout:
        said.append(line)
        if found := re.match(r"\[\d+/\d+\] (\w+): (.*)", line):
            now, rss = _cpu_seconds(process.pid), _status(process.pid)["VmHWM"]
            yield (
                f"{found[1]:12s} peak {rss / 1e6:6.0f} MB, anonymous {peaks[0] / 1e6:6.0f} MB, "
                f"{now - before:6.1f} CPU s  {found[2]}"
            )
            before, peaks[0] = now, 0
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak begins anew
    stop.set()
    if process.wait():
        raise SystemExit("".join(said[-15:]))


def _status(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _watch(pid: int, peaks: list[int], stop: threading.Event) -> None:
    while not stop.wait(0.05):
        try:
            peaks[0] = max(peaks[0], _status(pid).get("RssAnon", 0))
        except OSError:
            return


def rows(args: argparse.Namespace, folder: Path) -> Iterator[str]:
    for blocks in args.blocks or MODELS[args.model]["blocks"]:
        here = folder / f"{args.model}-{blocks}"
        here.mkdir(parents=True, exist_ok=True)
        if not (here / "parameters").exists():
            build_argv = [sys.executable, __file__, args.model, "--folder", str(here / "model"), "--build", str(blocks)]
            found = json.loads(measured(build_argv, here)["lines"][-1])
            (here / "parameters").write_text(str(found["parameters"]))
        parameters = int((here / "parameters").read_text())
        if args.tasks[0] not in FORWARDS:
            shutil.rmtree(here / "run", ignore_errors=True)
        for task in args.tasks:
            if task == "chain":
                yield from chain(command(task, args.model, here, args.overrides, args.tokens), here)
                continue
            m = measured(command(task, args.model, here, args.overrides, args.tokens), here)
            said = m["lines"][-1] if task in FORWARDS and m["lines"] else ""
            yield (
                f"{args.model:7s} {parameters / 1e9:6.2f} B  {task:10s} peak {m['rss'] / 1e6:7.0f} MB, anonymous "
                f"{m['anon'] / 1e6:7.0f} MB, {m['cpu']:7.1f} CPU s  {said}"
            )
        if not args.keep:
            shutil.rmtree(here)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--blocks", type=int, nargs="+", help="sizes to try")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="these, or stages of a run")
    parser.add_argument("--overrides", nargs="*", default=[], help="of the configuration, such as quant/smoothing=none")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="where everything goes (default: a temporary folder)")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--build", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--forward", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.build:
        build(args.model, args.build, args.folder)
    elif args.forward:
        forward(args.forward, args.model, args.folder, args.tokens)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            for row in rows(args, args.folder or Path(temporary)):
                print(row, flush=True)


if __name__ == "__main__":
    main()
