"""What the proxy pass of a sensitivity search costs beside one calibration, in one process.

    python benchmarks/sensitivity_cost.py                      # tiny_video, weights and activations at 4, 6, 8 bits
    python benchmarks/sensitivity_cost.py --overrides model=tiny_image quant/smoothing=static

Both are repeated in turns, so that a busy machine slows them alike; prints medians and their ratio (at most 3 is
wanted). Loading the model and encoding prompts are in neither.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from viditq import config
from viditq.models.adapter import ModelAdapter
from viditq.models.generate import denoise
from viditq.models.text import encode_prompt
from viditq.quant.calibration.calibrator import Calibrator
from viditq.quant.calibration.step_shares import step_shares
from viditq.quant.execution.model_linears import linear_names, shapes_of
from viditq.quant.search.candidates import candidates_of
from viditq.quant.search.policy import SensitivitySearch, groups_by_name
from viditq.quant.search.proxy import OneStep, proxy_errors
from viditq.quant.search.sensitivity import Swapper
from viditq.quant.setting import QuantSetting
from viditq.runner import quiet_libraries
from viditq.stages.search_table import PROXY_PROMPTS

WIDE = ["quant/policy=sensitivity", "quant.policy.activation_choices=[4,6,8]"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overrides", nargs="*", default=[])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    quiet_libraries()
    config.register()
    with initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        cfg = compose("config", ["experiment=w4a8_mp_search", *WIDE, *args.overrides])
    adapter: ModelAdapter = instantiate(cfg.model, _convert_="all")
    setting: QuantSetting = instantiate(cfg.quant, _convert_="all")
    policy = setting.policy
    assert isinstance(policy, SensitivitySearch)
    prompts = instantiate(cfg.data, _convert_="all").calibration_prompts
    text = adapter.load_text_part()
    embeds = [encode_prompt(adapter, text, prompt) for prompt in prompts]
    pipeline = adapter.load()
    denoiser = adapter.denoiser_of(pipeline)
    names = linear_names(denoiser)
    base = setting.plan(names, adapter.keep_float)
    shapes = shapes_of(denoiser)
    seconds: dict[str, list[float]] = {"calibration": [], "proxy pass": []}
    for _ in range(args.repeats):
        calibrator = Calibrator(denoiser, names, adapter.timestep_scale)
        start = time.perf_counter()
        for first in range(0, len(prompts), args.batch):
            indices = list(range(first, min(first + args.batch, len(prompts))))
            calibrator.set_sample_seeds(indices)
            with calibrator, torch.inference_mode():
                denoise(adapter, pipeline, [embeds[i] for i in indices], indices, seed=0)
        seconds["calibration"].append(time.perf_counter() - start)
        shares = step_shares(calibrator.stats, base.edges)
        space = policy.search(base, adapter.linear_roles(names), shapes, shares)
        candidates = candidates_of(space.cells, space.choices)
        start = time.perf_counter()
        with torch.inference_mode():
            swapper = Swapper(denoiser, base.edges, calibrator.stats, adapter.timestep_scale)
            one_step = OneStep(swapper)
            with one_step.recording():
                denoise(adapter, pipeline, embeds[:PROXY_PROMPTS], list(range(PROXY_PROMPTS)), seed=0)
            proxy_errors(denoiser, base, calibrator.stats, groups_by_name(space), candidates, one_step)
            swapper.close()
        seconds["proxy pass"].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{adapter.name}: {len(prompts)} calibration prompts, {len(candidates)} candidates")
    for name, median in medians.items():
        print(f"  {name:12s} median {median:7.2f} s")
    print(f"  ratio        {medians['proxy pass'] / medians['calibration']:.2f} (at most 3)")


if __name__ == "__main__":
    main()
