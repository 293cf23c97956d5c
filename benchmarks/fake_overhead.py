"""What emulation and calibration cost: one denoising run of the float model beside the same run quantized, or observed,
in one process.

    python benchmarks/fake_overhead.py                           # tiny_video: w8a8, w4a8 with and without smoothing
    python benchmarks/fake_overhead.py --calibration             # plain; calibrating: ranges, moments, inputs of blocks
    python benchmarks/fake_overhead.py --model tiny_image --batch 8
    python benchmarks/fake_overhead.py --blocks 1 --repeats 3    # calibrating a block of PixArt-XL, at 512 px

Prints medians and ratios of the time that went by and of processor time, which other processes disturb less; runs are
interleaved in an order drawn anew each round, so that a busy machine, and what a run leaves behind for the next, slow
all of them alike.
"""

import argparse
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import PixArtTransformer2DModel
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from real_size import CAPTIONS, PIXART
from torch import nn

from viditq import config
from viditq.models.adapter import ModelAdapter
from viditq.models.generate import denoise, generate
from viditq.models.text import PromptEmbeds, encode_prompt
from viditq.quant.calibration.calibrator import Calibrator
from viditq.quant.calibration.statistics import CalibrationStats
from viditq.quant.convert import quantize_denoiser
from viditq.quant.execution.model_linears import linear_names
from viditq.quant.reconstruction.collect import BlockInputs
from viditq.quant.reconstruction.joint_calibrator import JointCalibrator
from viditq.quant.setting import QuantSetting
from viditq.runner import quiet_libraries

SETTINGS = {
    "w8a8": ["quant=w8a8"],
    "w4a8": ["quant=w4a8"],
    "w4a8 + static smoothing": ["quant=w4a8", "quant/smoothing=static"],
    "w4a8 + timestep-aware smoothing": ["quant=w4a8", "quant/smoothing=timestep_aware"],
}


def configured(overrides: list[str]) -> tuple[ModelAdapter, QuantSetting]:
    """The adapter and quantization setting of these overrides."""
    with initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        cfg = compose("config", overrides)
        return instantiate(cfg.model, _convert_="all"), instantiate(cfg.quant, _convert_="all")


@dataclass(frozen=True)
class Float:
    """A float denoiser, and functions that sample the prompts `indices` with it once, without decoding and with."""

    overrides: list[str]
    adapter: ModelAdapter
    denoiser: nn.Module
    indices: list[int]
    sample: Callable[[], None]
    decoded: Callable[[], object] | None = None


def float_model(adapter: ModelAdapter, embeds: list[PromptEmbeds]) -> Float:
    """A model of conf/model, loaded anew."""
    pipeline, indices = adapter.load(), list(range(len(embeds)))
    sample = partial(denoise, adapter, pipeline, embeds, indices, seed=0)
    decoded = partial(generate, adapter, pipeline, embeds, indices, seed=0)
    return Float([f"model={adapter.name}"], adapter, adapter.denoiser_of(pipeline), indices, sample, decoded)


def pixart(num_blocks: int) -> Float:
    """That many of PixArt-XL/2's 28 blocks with random weights; 20 steps of one prompt at 512 px, with guidance."""
    overrides = ["model=pixart_alpha", "model.path='shipped:tiny_image'"]  # its weights are not looked at
    torch.manual_seed(0)
    settings = PIXART | {"num_layers": num_blocks, "use_additional_conditions": False}
    denoiser = PixArtTransformer2DModel(**settings).eval()
    latents, caption = torch.randn(2, 4, 64, 64), torch.randn(2, 120, CAPTIONS)

    @torch.no_grad()
    def sample() -> None:
        for timestep in range(975, 0, -50):
            denoiser(
                latents,
                caption,
                torch.full((2,), timestep),
                {"resolution": None, "aspect_ratio": None},
                encoder_attention_mask=torch.ones(2, 120),
                return_dict=False,
            )

    return Float(overrides, configured(overrides)[0], denoiser, [0], sample)


def calibrated(model: Float, moments: bool) -> tuple[CalibrationStats, Callable[[], None]]:
    """Statistics of one batch, and the calibrating run itself for timing; moments: as for GPTQ, of the same layers."""
    adapter, names = model.adapter, linear_names(model.denoiser)
    setting = configured([*model.overrides, "quant=w4a8", "quant/rounding=gptq"])[1]
    asked = setting.plan(names, adapter.keep_float).moment_layers if moments else []
    calibrator = Calibrator(model.denoiser, names, adapter.timestep_scale, moment_layers=asked)

    def run() -> None:
        calibrator.set_sample_seeds(model.indices)
        with calibrator:
            model.sample()

    run()
    return calibrator.stats, run


def keeping(model: Float, folder: Path) -> Callable[[], None]:
    """The calibrating run of a plan that learns roundings block by block: statistics, and inputs of blocks on disk."""
    adapter, names = model.adapter, linear_names(model.denoiser)
    setting = configured([*model.overrides, "quant=w4a8", "quant/rounding=block_adaround"])[1]
    plan = setting.plan(names, adapter.keep_float)

    def run() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        calibrator = Calibrator(model.denoiser, names, adapter.timestep_scale, moment_layers=plan.moment_layers)
        inputs = BlockInputs(model.denoiser, [*plan.learned_blocks], folder, 2**30, adapter.timestep_scale)
        both = JointCalibrator(calibrator, inputs)
        both.set_sample_seeds(model.indices)
        with both:
            model.sample()

    return run


def quantized(model: Float, setting: QuantSetting, stats: CalibrationStats) -> Callable[[], None]:
    """A function that samples once, without decoding, with the quantized model."""
    plan = setting.plan(linear_names(model.denoiser), model.adapter.keep_float)
    quantize_denoiser(model.denoiser, plan, stats, "fake", model.adapter.timestep_scale)
    return model.sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny_video")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--calibration", action="store_true", help="only the float model, observed and not")
    parser.add_argument("--blocks", type=int, help="calibrate so many blocks of PixArt-XL's size instead of a model")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    quiet_libraries()
    config.register()
    if args.blocks:
        title, calibration_only = f"PixArt-XL cut to {args.blocks} blocks, one prompt, 20 steps", True
        model = pixart(args.blocks)
    else:
        adapter, _ = configured([f"model={args.model}"])
        title, calibration_only = f"{args.model}, batch {args.batch}, {adapter.num_steps} steps", args.calibration
        text = adapter.load_text_part()
        embeds = [encode_prompt(adapter, text, "a small red circle moving left on a black background")] * args.batch
        model = float_model(adapter, embeds)
    stats, calibrating = calibrated(model, moments=False)  # observers leave nothing behind
    scratch = tempfile.TemporaryDirectory()
    runs: dict[str, Callable[[], object]] = {
        "float": model.sample,
        **({} if model.decoded is None else {"float, with decoding": model.decoded}),
        "float, calibrating": calibrating,
        "float, calibrating with moments": calibrated(model, moments=True)[1],
        "float, calibrating, inputs of blocks": keeping(model, Path(scratch.name) / "inputs"),
    }
    for name, overrides in SETTINGS.items() if not calibration_only else ():
        setting = configured([f"model={args.model}", *overrides])[1]
        runs[name] = quantized(float_model(adapter, embeds), setting, stats)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    order = random.Random(0)
    for repeat in range(args.repeats + 1):
        for name, run in order.sample([*runs.items()], len(runs)):
            start, busy = time.perf_counter(), time.process_time()
            run()
            if repeat:  # the first round warms up
                seconds[name].append((time.perf_counter() - start, time.process_time() - busy))
    print(f"{title}, {args.repeats} runs, {torch.get_num_threads()} threads")
    medians = {name: [statistics.median(v) for v in zip(*values, strict=True)] for name, values in seconds.items()}
    (base, busy_base) = medians["float"]
    for name, (median, busy) in medians.items():
        print(
            f"  {name:38s} median {median:7.3f} s   {median / base:5.2f}x float   processor {busy:7.3f} s   "
            f"{busy / busy_base:5.2f}x"
        )


if __name__ == "__main__":
    main()
