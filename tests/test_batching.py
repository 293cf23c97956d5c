"""What is measured for an artifact is measured in batches of its own: batch_size and processes change nothing in it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file

from viditq.engine.sampling import batches_of
from viditq.errors import UserError
from viditq.models.generate import denoise
from viditq.models.text import encode_prompt
from viditq.quant import CalibrationStats, Calibrator, linear_names, quantize_denoiser

Run = Callable[..., dict[str, Any] | None]
SHORT = ["stages=[prompts,calibrate,quantize]", "data.num_calibration_prompts=5", "++model.calibration_batch_size=2"]
RECIPES = {
    "smoothing": [],
    "second moments": ["quant/rounding=gptq", "quant/smoothing=static"],
    "correction": ["quant/smoothing=none", "quant.segments=[0.0,1.0]", "quant.correction=ptqd"],
}


# Slow: smoothing, whose statistics second moments come with.
@pytest.mark.parametrize("recipe", [pytest.param(r, marks=[pytest.mark.slow] * (r == "smoothing")) for r in RECIPES])
def test_artifacts_do_not_depend_on_the_batch_size(recipe: str, run: Run, tmp_path: Path) -> None:
    """Each run calibrates anew, in a cache of its own."""
    found = []
    for batch_size in (1, 2, 3, 8) if recipe == "smoothing" else (1, 3):
        folder = tmp_path / str(batch_size)
        run(folder / "run", folder / "cache", *SHORT, *RECIPES[recipe], f"batch_size={batch_size}")
        found.append({path.name: path.read_bytes() for path in (folder / "run" / "quantized").iterdir()})
        if recipe != "correction":
            (stats,) = (folder / "cache" / "stats").iterdir()
            found[-1]["stats"] = (stats / "stats.safetensors").read_bytes()
    assert all(other == found[0] for other in found[1:])


def test_statistics_of_two_processes(configure: Callable[..., Any]) -> None:
    """Smoothing's are the same to the bit; second moments are sums in float32, in another order."""
    cfg = configure("model=tiny_image", "model.num_steps=4", "quant=w4a8", "quant/smoothing=timestep_aware", "name=x")
    adapter, quant = (instantiate(node, _convert_="all") for node in (cfg.model, cfg.quant))
    pipeline, text = adapter.load(), adapter.load_text_part()
    embeds = [encode_prompt(adapter, text, f"a {colour} circle") for colour in ("red", "green", "blue", "red", "red")]
    denoiser = adapter.denoiser_of(pipeline)
    names = linear_names(denoiser)
    plan = quant.plan(names, adapter.keep_float)

    def observed(batches: list[list[int]]) -> CalibrationStats:
        calibrator = Calibrator(denoiser, names, adapter.timestep_scale, moment_layers=names[-4:])
        for batch in batches:
            calibrator.set_sample_seeds(batch)
            with calibrator:
                denoise(adapter, pipeline, [embeds[i] for i in batch], batch, 0)
        return calibrator.stats

    batches = batches_of(5, 2)
    alone, first = observed(batches), observed(batches[::2])
    first.merge(observed(batches[1::2]))
    one, two = alone.to_tensors(), first.to_tensors()
    for name in one:
        if name.startswith("@moments/sum"):
            assert torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-3)
        else:
            assert torch.equal(one[name], two[name]), name
    quantized = [adapter.denoiser_of(adapter.load()) for _ in range(2)]
    for other, stats in zip(quantized, (alone, first), strict=True):
        quantize_denoiser(other, plan, stats)
    states = [other.state_dict() for other in quantized]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("precision=bf16-mixed", r"trainer\.precision=bf16-mixed.*model\.dtype"),
        ("precision=16-true", r"trainer\.precision=16-true.*give 32-true"),
        ("precision=64", r"trainer\.precision=64"),
        ("use_distributed_sampler=true", r"trainer\.use_distributed_sampler=True: it would leave out batches"),
        ("+limit_predict_batches=1", r"trainer\.limit_predict_batches=1"),
        ("+limit_test_batches=0.5", r"trainer\.limit_test_batches=0\.5.*data\.num_prompts"),
        ("+fast_dev_run=true", r"trainer\.fast_dev_run=True"),
    ],
)
def test_a_trainer_that_would_change_results(setting: str, words: str, run: Run, tmp_path: Path) -> None:
    key = f"+trainer.{setting[1:]}" if setting[0] == "+" else f"trainer.{setting}"
    with pytest.raises(UserError, match=words):
        run(tmp_path / "run", tmp_path / "cache", key)
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_the_batch_of_calibration_is_part_of_what_is_cached(run: Run, tmp_path: Path) -> None:
    for size in (1, 2):
        run(tmp_path / f"run{size}", tmp_path / "cache", *SHORT, f"++model.calibration_batch_size={size}")
    stats = [load_file(path / "stats.safetensors") for path in (tmp_path / "cache" / "stats").iterdir()]
    assert len(stats) == 2 and len([*(tmp_path / "cache" / "prompts").iterdir()]) == 1
    with pytest.raises(UserError, match=r"model\.calibration_batch_size=0"):
        run(tmp_path / "run", tmp_path / "cache", *SHORT, "++model.calibration_batch_size=0")
