"""Cosmos 3 and OmniGen: no text encoder, and so nothing to cache but the words, which the denoiser reads itself."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import load_image
from hydra.utils import instantiate
from zoo import worded
from zoo.pictures import draw_noise

from viditq.errors import UserError
from viditq.estimate import estimate
from viditq.experiment import build
from viditq.files import read_json, write_json
from viditq.job import Job
from viditq.loading import load_quantized
from viditq.models import parts
from viditq.models.adapter import ModelAdapter
from viditq.models.generate import _as_tensor, _call, generate, noise_generator, with_settings
from viditq.models.native import processors
from viditq.models.step_noise import seeded_steps
from viditq.models.stored_embeds import read_embeds, write_embeds
from viditq.models.text import encode_prompt
from viditq.prompt import Prompt
from viditq.quant import linear_names
from viditq.quant.calibration.statistics import CalibrationStats
from viditq.quant.calibration.step_rows import batch_size
from viditq.run_dir import RunDir
from viditq.runner import run

TEXTS = ("a small red circle", "a large blue square")
SHRUNK = ["name=x", "model.height=32", "model.width=32", "model.num_frames=5", "model.dtype=float32"]
RUN = [
    *("quant=w4a8", "quant/smoothing=static", "data.num_prompts=1", "data.num_calibration_prompts=2", "batch_size=1"),
    *("metric=[psnr]", "noise_floor.num_prompts=0", "diagnosis.num_prompts=1", "logger=none", "model.num_steps=2"),
    "stages=[prompts,reference,calibrate,quantize,generate,diagnose,evaluate]",
]
Make = Callable[..., Any]


@pytest.fixture
def shrink(configure: Make, folder_of: Callable[..., Path], tmp_path: Path) -> Make:
    """(builder, *overrides) -> the configuration of a shrunk run."""

    def shrink(builder: Callable[[], Any], *overrides: str) -> Any:
        paths = (f"model.path='{folder_of(builder)}'", f"cache_dir='{tmp_path}/cache'")
        return configure("model=cosmos3", *SHRUNK, *paths, *overrides)

    return shrink


def made(cfg: Any) -> ModelAdapter:
    adapter: ModelAdapter = instantiate(cfg.model, _convert_="all")
    return adapter


# Slow: Edge's layers, which differ in their mlps and norms; a whole run of them is in test_zoo_videos.
@pytest.mark.parametrize("builder", [worded.cosmos3, pytest.param(worded.cosmos3_edge, marks=pytest.mark.slow)])
def test_samples_are_those_of_the_pipelines_own_call(builder: Callable[[], Any], shrink: Make, tmp_path: Path) -> None:
    """And depend on the prompt and on no batch mate; what is kept of a prompt is its words."""
    adapter = made(shrink(builder, "model.num_steps=3"))
    found = [*adapter.linear_roles(linear_names(adapter.build_denoiser())).values()]
    mlps = 8 if builder is worded.cosmos3_edge else 12
    assert {role: found.count(role) for role in found} == {"float": 7, "joint_attention": 16, "mlp": mlps}
    text_part, pipeline = adapter.load_text_part(), adapter.load()
    for number, text in enumerate(TEXTS):
        write_embeds(tmp_path / f"{number}.safetensors", encode_prompt(adapter, text_part, text))
    assert (tmp_path / "0.safetensors").stat().st_size < 500
    embeds = [read_embeds(tmp_path / f"{number}.safetensors", "") for number in range(2)]
    ours, second = (_call(adapter, pipeline, [one], [3], 0, "pt").float() for one in embeds)
    assert ours.shape == (5, 3, 32, 32) and (ours - second).abs().max() > 1e-5
    both = generate(adapter, pipeline, embeds, [3, 3], 0).float()
    alone = (torch.stack([ours, second]).clamp(0, 1) * 255).round()
    assert (both - alone).abs().max() <= 1
    whole = with_settings(adapter, adapter.load_complete())
    theirs = whole(TEXTS[0], generator=noise_generator(0, 3), output_type="pt", return_dict=False)[0]
    torch.testing.assert_close(ours, _as_tensor(theirs).float(), rtol=0, atol=1e-5)


def test_a_whole_run(shrink: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The artifact samples by itself; a prompt is one element, whatever else has two axes."""
    metrics = run(shrink(worded.cosmos3, *RUN), tmp_path / "run")
    assert metrics is not None and 0 < metrics["metrics"]["psnr"] < 100
    assert "sound: none is made; 2 of its 2 Linears stay in float" in capsys.readouterr().out
    plan = read_json(tmp_path / "run" / "quantized" / "plan.json")["layers"]
    errors = read_json(tmp_path / "run" / "errors.json")["layers"]
    assert len(plan) == len(errors) == 28 and all(layer["total"] > 0 for layer in errors.values())
    (file,) = (tmp_path / "cache" / "stats").glob("*/stats.safetensors")
    stats = CalibrationStats.load(file).layers
    of_words, of_frames = (stats[f"layers.0.self_attn.{name}"] for name in ("to_q", "add_q_proj"))
    assert of_words is not of_frames and of_words is stats["layers.0.self_attn.to_k"]
    pipeline = load_quantized(tmp_path / "run")
    clip = pipeline(TEXTS[0], generator=noise_generator(0, 0), output_type="pt", return_dict=False)[0]
    assert clip.shape == (5, 3, 32, 32) and torch.isfinite(clip).all()


def test_what_is_guessed_and_measured(configure: Make, folder_of: Callable[..., Path]) -> None:
    own = [f"model.path='{folder_of(worded.cosmos3)}'", "model.num_steps=4"]
    adapter = made(configure("model=diffusers", *SHRUNK, *own))
    assert adapter.encode_outputs == [] and adapter.reads_words and adapter.conditions == ["image", "video"]
    assert adapter.timestep_scale == {"at_noise": 1000.0, "at_clean": 0.0, "argument": "vision_timesteps"}
    found = adapter.linear_roles(linear_names(adapter.build_denoiser()))
    assert sum(role == "joint_attention" for role in found.values()) == 16
    with pytest.raises(UserError, match=r"model\.encode\.foo: Cosmos3OmniPipeline encodes nothing"):
        replace(adapter, encode={"foo": 1})


# Slow: that autocast, which the denoiser switches off, is followed on the meta device.
@pytest.mark.slow
def test_its_size_is_estimated_without_weights(shrink: Make, tmp_path: Path) -> None:
    experiment = build(shrink(worded.cosmos3, *RUN))
    found = estimate(Job(experiment, RunDir(tmp_path / "run", experiment.tracked)), "meta")
    denoiser = experiment.adapter.build_denoiser()
    assert found.parts["transformer"][0] == sum(p.numel() for p in denoiser.parameters())


def test_prompts_are_shown_to_the_checker(shrink: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As they are encoded, before anything slow, and at every sample."""
    shown = worded.guarded(monkeypatch)
    plain = made(shrink(worded.cosmos3))
    folder = Path(shutil.copytree(plain.folder, tmp_path / "model"))
    index = read_json(folder / "model_index.json")
    write_json(folder / "model_index.json", {**index, "enable_safety_checker": True})
    adapter = made(shrink(worded.cosmos3, f"model.path='{folder}'", "model.num_steps=2"))
    embeds = encode_prompt(adapter, adapter.load_text_part(), TEXTS[0])
    assert shown == [TEXTS[0]]
    _call(adapter, adapter.load(), [embeds], [3], 0, "latent")
    assert shown == [TEXTS[0]] * 2


def test_packages_are_asked_for_where_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("cosmos_guardrail", "torchvision"):
        monkeypatch.setattr(f"diffusers.utils.import_utils.is_{package}_available", lambda: False)
    index = {name: ["diffusers", "X"] for name in ("text_tokenizer", "tokenizer", "transformer", "vae", "scheduler")}
    with pytest.raises(UserError, match=r"pip install cosmos_guardrail\. \(Its licence"):
        parts.check_pipeline("Cosmos3OmniPipeline", index)
    parts.check_pipeline("Cosmos3OmniPipeline", {**index, "enable_safety_checker": False})
    with pytest.raises(UserError, match=r"OmniGenPipeline needs .*: pip install torchvision\.$"):
        parts.check_pipeline("OmniGenPipeline", index)


# Slow: inputs of blocks kept as whole sequences; no other model has such.
@pytest.mark.slow
def test_blocks_without_a_batch_axis_can_be_reconstructed(shrink: Make, tmp_path: Path) -> None:
    """Each kept input is a call by itself; the words' stream of the last block reaches nothing, and yet is learned."""
    few = [f"quant.rounding.{name}=2" for name in ("iterations", "layer_iterations", "tokens")]
    stages = ["stages=[prompts,calibrate,quantize]", "quant/rounding=block_adaround", *few]
    run(shrink(worded.cosmos3, *RUN, *stages), tmp_path / "run")
    records = read_json(tmp_path / "run" / "reconstruction.json")
    assert [record["block"] for record in records] == ["layers.0", "layers.1"]
    assert all(0 < record["errors"][record["kept"]] < 0.5 for record in records)


def test_our_attention_has_no_causal_mask() -> None:
    with pytest.raises(UserError, match=r"causal mask .* Cosmos3OmniTransformer\.layers\.0\.self_attn has one"):
        processors.check_heads(worded.cosmos3().transformer)


def test_omnigen_with_a_picture(configure: Make, folder_of: Callable[..., Path], tmp_path: Path) -> None:
    """Three branches in a batch; the prompt says where the picture belongs, and is refused where it does not."""
    pytest.importorskip("torchvision", reason="its processor resizes with it")
    picture = draw_noise(tmp_path, [("0", 48, 64)]) / "0.png"
    text = f"<img><|image_1|></img> {TEXTS[0]}"
    (tmp_path / "table.csv").write_text(f"prompt,picture\n{text},0.png\n{text} again,0.png\n")
    data = ["data=image_prompts", f"data.path='{tmp_path}/table.csv'", "data.conditions={input_images: picture}"]
    sizes = [one for one in SHRUNK if "num_frames" not in one]
    paths = [f"model.path='{folder_of(worded.omnigen)}'", f"cache_dir='{tmp_path}/cache'"]
    cfg = configure("model=omnigen", *sizes, *paths, *RUN, *data)
    metrics = run(cfg, tmp_path / "run")
    assert metrics is not None and 0 < metrics["metrics"]["psnr"] < 100
    adapter = made(cfg)
    text_part, pipeline = adapter.load_text_part(), adapter.load()
    embeds = [encode_prompt(adapter, text_part, one) for one in (Prompt(text, {"input_images": picture}), TEXTS[0])]
    ours, plain = (_call(adapter, pipeline, [one], [3], 0, "pt") for one in embeds)
    assert (ours - plain).abs().max() > 1e-3
    whole, generator = with_settings(adapter, adapter.load_complete()), noise_generator(0, 3)
    with seeded_steps(whole, [generator]):  # its VAE draws the picture's latents from torch's own generator
        given = {"input_images": [load_image(str(picture))], "output_type": "pt", "return_dict": False}
        theirs = whole(prompt=text, generator=generator, **given)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="doesn't have enough placeholders"):
        encode_prompt(adapter, text_part, Prompt(TEXTS[0], {"input_images": picture}))


def test_positions_are_no_batch() -> None:
    """Cosmos 3's denoiser gets [3, N] of them before its frames."""
    positions, frames = torch.zeros(3, 7), torch.zeros(1, 4, 2, 2)
    assert batch_size([positions, [frames]]) == 1 and batch_size([positions, frames.expand(2, -1, -1, -1)]) == 2
    assert batch_size([positions]) == 3
