"""Real sizes on an ordinary machine: a denoiser of its real configuration and random weights is calibrated and
quantized, each stage in a process of its own, and what it took is set against what `estimate` said before.

    python benchmarks/real_size.py pixart_alpha                  # PixArt-XL/2, 28 blocks x 1152
    python benchmarks/real_size.py opensora_v1 --folder /data    # STDiT-XL/2; keeps the random pipeline there
    python benchmarks/real_size.py pixart_alpha --overrides quant/rounding=gptq --stages prompts calibrate quantize

The denoiser is real in everything but its values. VAE and text encoder are tiny (the encoder as wide as the denoiser's
captions), latents small, prompts and steps few: none of them changes what quantizing holds, and calibrating holds more
by the activations of larger latents alone. Rounding is to nearest, W4A8 with static smoothing, where no override says
otherwise.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from hydra import compose, initialize_config_dir
from transformers import T5Config, T5EncoderModel

from viditq import config
from viditq.assets import SHIPPED
from viditq.engine.processes import Processes
from viditq.estimate import estimate, resident_bytes
from viditq.estimate.table import duration, size
from viditq.experiment import Experiment, build
from viditq.files import read_json, write_json
from viditq.job import Job
from viditq.models.registry import find_class
from viditq.quant.artifact import size_bytes
from viditq.run_dir import RunDir
from viditq.seconds import read_seconds

ROOT = Path(__file__).parents[1]
CAPTIONS, LATENT = 4096, 16
STAGES = ("prompts", "calibrate", "quantize", "generate")
PIXART = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "attention_bias": True,
    "sample_size": 128,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "interpolation_scale": 2.0,
    "use_additional_conditions": True,
    "caption_channels": CAPTIONS,
}
MODELS: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {  # class, pipeline, configuration, overrides
    "pixart_alpha": (
        "PixArtTransformer2DModel",
        "PixArtAlphaPipeline",
        PIXART,
        ["model.call.use_resolution_binning=false"],
    ),
    "opensora_v1": ("STDiT", "OpenSoraPipeline", {}, ["model.num_frames=4", "model.encode.clean_caption=false"]),
}


def build_folder(name: str, folder: Path) -> None:
    """The random pipeline, weights stored in float16 as the published ones are."""
    cls, pipeline, settings, _ = MODELS[name]
    shutil.copytree(SHIPPED / "tiny_image", folder, ignore=shutil.ignore_patterns("transformer", "text_encoder"))
    index = read_json(folder / "model_index.json")
    library = "diffusers" if hasattr(diffusers, cls) else find_class(cls).__module__
    write_json(folder / "model_index.json", {**index, "_class_name": pipeline, "transformer": [library, cls]})
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    denoiser = find_class(cls)(**settings)
    denoiser.save_pretrained(folder / "transformer")
    t5 = T5Config(vocab_size=32, d_model=CAPTIONS, d_kv=8, d_ff=64, num_layers=1, num_heads=2)
    T5EncoderModel(t5).save_pretrained(folder / "text_encoder")


def experiment_of(name: str, folder: Path, overrides: Sequence[str]) -> tuple[Experiment, RunDir]:
    """The experiment and the folder of its run."""
    config.register()
    write = folder / "prompts.txt"
    write.write_text("a small red circle on a white background\n")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(
            "config",
            [
                *(f"model={name}", f"model.path='{folder / 'model'}'", "model.dtype=float32", "model.num_steps=2"),
                *(f"model.height={LATENT * 4}", f"model.width={LATENT * 4}", *MODELS[name][3]),
                *("data=prompt_file", f"data.path='{write}'", "data.num_prompts=1", "data.num_calibration_prompts=1"),
                *("quant=w4a8", "quant/smoothing=static", "logger=none", "metric=psnr", "name=real_size"),
                *(f"cache_dir='{folder / 'cache'}'", "batch_size=1", "noise_floor.num_prompts=0"),
                *overrides,
            ],
        )
    experiment = build(cfg)
    return experiment, RunDir(folder / "run", experiment.tracked)


def child(task: str, name: str, folder: Path, overrides: Sequence[str]) -> None:
    """One stage, or the estimate as json."""
    from viditq.runner import quiet_libraries

    quiet_libraries()
    _work(task, name, folder, overrides)
    (folder / "peak").write_text(str(resident_bytes()))


def _work(task: str, name: str, folder: Path, overrides: Sequence[str]) -> None:
    if task == "build":
        build_folder(name, folder / "model")
        return
    experiment, run_dir = experiment_of(name, folder, overrides)
    job = Job(experiment, run_dir)
    if task != "estimate":
        from viditq.runner import run_stages

        run_stages(replace(experiment, stages=(task,)), run_dir, Processes())
        return
    told = estimate(job, True)
    seconds = {stage: work.seconds for stage, work in told.works.items() if stage in STAGES}
    peaks = {stage: peak.ram + told.base for stage, peak in told.peaks.items()}
    sizes = {"artifact": told.artifact, "statistics": told.stats, "parameters": told.float16 // 2}
    write_json(folder / "told.json", {"peaks": peaks, "seconds": seconds, **sizes})


def measured(task: str, name: str, folder: Path, overrides: Sequence[str] = ()) -> tuple[float, int]:
    """Seconds and peak RAM in bytes of a task in a process of its own."""
    start = time.perf_counter()
    command = [sys.executable, __file__, name, "--folder", str(folder), "--task", task]
    if subprocess.run([*command, "--overrides", *overrides]).returncode:
        raise SystemExit(f"{task} failed")
    return time.perf_counter() - start, int((folder / "peak").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--folder", type=Path, help="where everything goes and stays (default: a temporary folder)")
    parser.add_argument("--overrides", nargs="*", default=[], help="of the configuration")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        child(args.task, args.model, args.folder, args.overrides)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "model").is_dir():
            measured("build", args.model, folder)
        took, peak = measured("estimate", args.model, folder, args.overrides)
        told = json.loads((folder / "told.json").read_text())
        print(f"\n{args.model}: {told['parameters']:,} parameters in the denoiser", flush=True)
        print(f"  estimating  peak RAM {size(peak)}, {duration(took)}", flush=True)
        for stage in args.stages:
            took, peak = measured(stage, args.model, folder, args.overrides)
            print(
                f"  {stage:10s}  peak RAM estimated {size(told['peaks'][stage])}, measured {size(peak)}; "
                f"estimated {duration(told['seconds'].get(stage))}, measured {duration(own_seconds(folder, stage))} "
                f"(whole process {duration(took)})",
                flush=True,
            )
        found = {"artifact": size_bytes(folder / "run" / "quantized")} if "quantize" in args.stages else {}
        if "calibrate" in args.stages:
            found["statistics"] = stats_file(folder).stat().st_size
        for what, there in found.items():
            print(f"  {what:10s}  estimated {told[what]:,} bytes, measured {there:,}")


def stats_file(folder: Path) -> Path:
    """The statistics made last."""
    return max((folder / "cache" / "stats").rglob("stats.safetensors"), key=lambda path: path.stat().st_mtime)


def own_seconds(folder: Path, stage: str) -> float | None:
    """What the stage itself recorded."""
    recorded = read_seconds(folder / "run")
    if stage not in ("prompts", "quantize", "generate"):
        recorded |= read_seconds(stats_file(folder).parent)
    return recorded.get(stage)


if __name__ == "__main__":
    main()
