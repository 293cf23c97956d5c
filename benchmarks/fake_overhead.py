"""What emulation and calibration cost: one denoising run of the float model beside the same run quantized, or observed,
in one process.

    python benchmarks/fake_overhead.py                           # tiny_video: w8a8, w4a8 with and without smoothing
    python benchmarks/fake_overhead.py --calibration             # plain; calibrating: ranges, moments, inputs of blocks
    python benchmarks/fake_overhead.py --model tiny_image --batch 8

Prints medians and ratios of the time that went by and of processor time, which other processes disturb less; runs are
interleaved, so that a busy machine slows all of them alike.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from viditq import config
from viditq.models.adapter import ModelAdapter
from viditq.models.generate import denoise
from viditq.models.text import PromptEmbeds, encode_prompt
from viditq.quant.calibration import Calibrator
from viditq.quant.convert import linear_names, quantize_denoiser
from viditq.quant.observers import CalibrationStats
from viditq.quant.reconstruction.collect import BlockInputs
from viditq.quant.reconstruction.together import Together
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


def calibrated(
    adapter: ModelAdapter, embeds: list[PromptEmbeds], moments: bool
) -> tuple[CalibrationStats, Callable[[], None]]:
    """Statistics of one batch, and the calibrating run itself for timing; moments: as for GPTQ, of the same layers."""
    pipeline = adapter.load()
    denoiser = adapter.denoiser_of(pipeline)
    names = linear_names(denoiser)
    setting = configured([f"model={adapter.name}", "quant=w4a8", "quant/rounding=gptq"])[1]
    asked = setting.plan(names, adapter.keep_float).moment_layers if moments else []
    calibrator = Calibrator(denoiser, names, adapter.timestep_scale, moment_layers=asked)
    indices = list(range(len(embeds)))

    def run() -> None:
        calibrator.set_sample_seeds(indices)
        with calibrator:
            denoise(adapter, pipeline, embeds, indices, seed=0)

    run()
    return calibrator.stats, run


def keeping(adapter: ModelAdapter, embeds: list[PromptEmbeds], folder: Path) -> Callable[[], None]:
    """The calibrating run of a plan that learns roundings block by block: statistics, and inputs of blocks on disk."""
    pipeline = adapter.load()
    denoiser = adapter.denoiser_of(pipeline)
    names = linear_names(denoiser)
    setting = configured([f"model={adapter.name}", "quant=w4a8", "quant/rounding=block_adaround"])[1]
    plan = setting.plan(names, adapter.keep_float)
    indices = list(range(len(embeds)))

    def run() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        calibrator = Calibrator(denoiser, names, adapter.timestep_scale, moment_layers=plan.moment_layers)
        inputs = BlockInputs(denoiser, [*plan.learned_blocks], folder, 2**30, adapter.timestep_scale)
        both = Together(calibrator, inputs)
        both.set_sample_seeds(indices)
        with both:
            denoise(adapter, pipeline, embeds, indices, seed=0)

    return run


def runner_of(
    adapter: ModelAdapter, embeds: list[PromptEmbeds], setting: QuantSetting | None, stats: CalibrationStats | None
) -> Callable[[], None]:
    """A function that samples once, without decoding, with the (quantized) model."""
    pipeline = adapter.load()
    denoiser = adapter.denoiser_of(pipeline)
    if setting is not None:
        plan = setting.plan(linear_names(denoiser), adapter.keep_float)
        quantize_denoiser(denoiser, plan, stats, "fake", adapter.timestep_scale)
    return lambda: denoise(adapter, pipeline, embeds, list(range(len(embeds))), seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny_video")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--calibration", action="store_true", help="only the float model, observed and not")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    quiet_libraries()
    config.register()
    adapter, _ = configured([f"model={args.model}"])
    text = adapter.load_text_part()
    embeds = [encode_prompt(adapter, text, "a small red circle moving left on a black background")] * args.batch
    stats, calibrating = calibrated(adapter, embeds, moments=False)
    scratch = tempfile.TemporaryDirectory()
    runs = {
        "float": runner_of(adapter, embeds, None, None),
        "float, calibrating": calibrating,
        "float, calibrating with moments": calibrated(adapter, embeds, moments=True)[1],
        "float, calibrating, inputs of blocks": keeping(adapter, embeds, Path(scratch.name) / "inputs"),
    }
    for name, overrides in SETTINGS.items() if not args.calibration else ():
        runs[name] = runner_of(adapter, embeds, configured([f"model={args.model}", *overrides])[1], stats)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for repeat in range(args.repeats + 1):
        for name, run in runs.items():
            start, busy = time.perf_counter(), time.process_time()
            run()
            if repeat:  # the first round warms up
                seconds[name].append((time.perf_counter() - start, time.process_time() - busy))
    print(
        f"{args.model}, batch {args.batch}, {adapter.num_steps} steps, {args.repeats} runs, "
        f"{torch.get_num_threads()} threads"
    )
    medians = {name: [statistics.median(v) for v in zip(*values, strict=True)] for name, values in seconds.items()}
    (base, busy_base) = medians["float"]
    for name, (median, busy) in medians.items():
        print(
            f"  {name:38s} median {median:7.3f} s   {median / base:5.2f}x float   processor {busy:7.3f} s   "
            f"{busy / busy_base:5.2f}x"
        )


if __name__ == "__main__":
    main()
