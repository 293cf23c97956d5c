"""quant.correction=ptqd through a whole run: its samples and its artifact are the corrected ones."""

import copy
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from PIL import Image
from safetensors.torch import load_file

from viditq.engine.partials import Partials
from viditq.errors import UserError
from viditq.experiment import build
from viditq.files import read_json
from viditq.loading import load_quantized
from viditq.models.adapter import ModelAdapter
from viditq.models.generate import noise_generator
from viditq.quant.artifact import OWN_KEYS, load_denoiser
from viditq.quant.artifact_writer import save_denoiser
from viditq.stages import correct


def test_a_run_with_correction(run: Callable[..., Any], shared_cache: Path, tmp_path: Path) -> None:
    overrides = ["quant=w4a4", "quant/smoothing=none", "quant.segments=[0.0,1.0]"]
    plain = run(tmp_path / "plain", shared_cache, *overrides)
    corrected = run(tmp_path / "ptqd", shared_cache, *overrides, "quant.correction=ptqd")
    assert not (tmp_path / "ptqd" / "uncorrected").exists()
    first, second = (read_json(tmp_path / name / "errors.json")["denoiser"] for name in ("plain", "ptqd"))
    pairs = [(a, b) for a, b in zip(first["relative_error"], second["relative_error"], strict=True) if a is not None]
    assert len(pairs) == 2 and all(b < a for a, b in pairs)
    assert plain is not None and corrected is not None and plain != corrected
    transformer = load_quantized(tmp_path / "ptqd").transformer
    assert transformer.output_correction.bias.shape == (20, 4)
    again = run(tmp_path / "ptqd", shared_cache, *overrides, "quant.correction=ptqd")
    assert again == corrected


PLAIN = ["quant=w4a4", "quant/smoothing=none", "quant.segments=[0.0,1.0]"]
SHORT = ["noise_floor.num_prompts=0", "diagnosis.num_prompts=0", "metric=psnr"]
STOCHASTIC = [
    *PLAIN,
    "+model.scheduler_settings={algorithm_type: sde-dpmsolver++, solver_order: 1}",
    "model.num_steps=4",
]
PTQD = [*STOCHASTIC, "quant.correction=ptqd"]


@pytest.fixture(scope="module")
def stochastic(run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a run with a stochastic sampler, and its cache."""
    folder = tmp_path_factory.mktemp("stochastic")
    run(folder / "run", folder / "cache", *PTQD)
    return folder / "run", folder / "cache"


def numbers(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = read_json(folder / "metrics.json")
    return {key: value for key, value in values.items() if key not in ("seconds", "fingerprint", "experiment")}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {k: t for file in (folder / "quantized").glob("*.safetensors") for k, t in load_file(file).items()}
    return {name: tensor for name, tensor in found.items() if "output_correction" in name}


def test_the_sampler_adds_less_noise(
    run: Callable[..., Any],
    stochastic: tuple[Path, Path],
    tmp_path: Path,
    configure: Callable[..., DictConfig],
    shrunk: list[str],
) -> None:
    folder, cache = stochastic
    run(tmp_path / "mean", cache, *STOCHASTIC, "quant.correction=ptqd_mean")
    assert numbers(tmp_path / "mean") != numbers(folder)
    assert not any(name.endswith("variance") for name in tensors(tmp_path / "mean"))
    (variance,) = [tensor for name, tensor in tensors(folder).items() if name.endswith("variance")]
    assert variance.shape == (20,) and float(variance.min()) > 0
    assert type(load_quantized(folder).scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert hasattr(load_quantized(folder).scheduler.step, "__wrapped__"), "shrunk there too"
    assert not hasattr(load_quantized(tmp_path / "mean").scheduler.step, "__wrapped__")
    experiment = build(configure(*shrunk, *PTQD))
    prompt = experiment.data.prompts[0]
    pipeline = load_quantized(folder)
    saved = read_image(folder / "samples" / "000000.png")
    for _ in ("as loaded", "with a copy of its denoiser"):
        picture = pipeline(prompt, generator=[noise_generator(0, 0)], output_type="pt").images[0]
        assert int(((picture.clamp(0, 1) * 255).round() - saved).abs().max()) <= 1
        pipeline.transformer = copy.deepcopy(pipeline.transformer)
    with pytest.raises(UserError, match="a second time"):
        copy.deepcopy(pipeline)


def read_image(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path))).movedim(-1, 0).float()


def test_an_artifact_without_the_variance_is_refused(stochastic: tuple[Path, Path], tmp_path: Path) -> None:
    """As an earlier version left it."""
    adapter = build_adapter(stochastic[0])
    denoiser, plan, meta, _ = load_denoiser(stochastic[0] / "quantized", adapter.build_denoiser)
    denoiser.output_correction.variance = None
    save_denoiser(tmp_path / "old", denoiser, plan, without(meta))
    with pytest.raises(UserError, match="quantize again"):
        load_quantized(tmp_path / "old")
    save_denoiser(tmp_path / "mean", denoiser, plan, {**without(meta), "correction": "ptqd_mean"})
    load_quantized(tmp_path / "mean")


def without(meta: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in meta.items() if k not in OWN_KEYS}


def build_adapter(folder: Path) -> ModelAdapter:
    return ModelAdapter.from_dict(read_json(folder / "quantized" / "meta.json")["model"])


# Slow: that sums of a correction are merged; what processes share and how is in test_processes.py.
@pytest.mark.slow
def test_two_processes_fit_the_same(run: Callable[..., Any], stochastic: tuple[Path, Path], tmp_path: Path) -> None:
    folder, cache = stochastic
    run(tmp_path / "run", cache, *PTQD, "trainer=ddp_cpu", "trainer.devices=2")
    found, expected = tensors(tmp_path / "run"), tensors(folder)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7, msg=name)
    for path in sorted((folder / "samples").glob("*.png")):
        assert float((read_image(path) - read_image(tmp_path / "run" / "samples" / path.name)).abs().max()) <= 1


def test_killed_in_the_fit_and_repeated(run: Callable[..., Any], stochastic: tuple[Path, Path], tmp_path: Path) -> None:
    """Killed after the first of two batches of the fit, then after the first save of the artifact, then at its end."""
    folder, cache = stochastic
    work = tmp_path / "run" / "uncorrected"
    for place in ("after the first batch", "before the artifact is there", "before the work is removed"):
        pid = os.fork()
        if not pid:
            try:
                torch.set_num_threads(1)  # of two threads that do so first in a forked process, one fails now and then
                die(place)
                run(tmp_path / "run", cache, *PTQD, "stages=[prompts,quantize]")
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL, place
        assert work.is_dir() and list(work.glob("partial-*")), place
    run(tmp_path / "run", cache, *PTQD, "stages=[prompts,quantize]")
    assert not work.exists()
    for name, tensor in tensors(folder).items():
        assert torch.equal(tensors(tmp_path / "run")[name], tensor), name


def die(place: str) -> None:
    """Let this process be killed there."""

    def kill(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def after(function: Callable[..., Any]) -> Callable[..., Any]:
        def run_and_die(*args: Any, **kwargs: Any) -> None:
            function(*args, **kwargs)
            kill()

        return run_and_die

    if place == "after the first batch":
        Partials.save = after(Partials.save)  # type: ignore[method-assign]
    elif place == "before the artifact is there":
        correct.attach_corrections = kill
    else:
        correct.save_with = after(correct.save_with)


def test_the_seed_counts(run: Callable[..., Any], stochastic: tuple[Path, Path], tmp_path: Path) -> None:
    """Another seed fits on other noise; the same seed fits the same again."""
    folder, cache = stochastic
    other, same = tmp_path / "other", tmp_path / "same"
    stages = "stages=[prompts,quantize]"
    run(other, cache, *PTQD, "seed=1", stages)
    run(same, cache, *PTQD, stages)
    for name, tensor in tensors(folder).items():
        assert torch.equal(tensors(same)[name], tensor)
        assert name.endswith("axis") or not torch.equal(tensors(other)[name], tensor), name


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["quant.correction=x"], "ptqd"),
        (["quant=none"], "nothing"),
        (["+model.scheduler=DDPMScheduler"], "prediction_type"),
        (["+model.scheduler=FlowMatchLCMScheduler", "quant=w4a8"], "FlowMatchLCMScheduler"),
        (["+model.scheduler=PixArtAlphaPipeline"], "no scheduler"),
        (["+model.scheduler_settings={solver: 2}"], "solver_order"),
        (["+model.scheduler_settings={algorithm_type: sde-dpmsolver++, thresholding: true}"], "clips"),
        (["quant=none", "quant.correction=null", "bits=w4a8"], "in float"),
    ],
)
def test_refusals(configure: Callable[..., DictConfig], overrides: list[str], word: str) -> None:
    with pytest.raises(Exception, match=word) as caught:
        build(configure("name=x", "model=tiny_image", "quant.correction=ptqd", *overrides))
    assert isinstance(caught.value.__cause__ or caught.value, UserError)
