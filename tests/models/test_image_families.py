"""The yamls of 2025's and 2026's image models, each on a tiny random pipeline of its real classes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.utils import load_image
from hydra.utils import instantiate
from transformers.utils import is_torchvision_available
from zoo import (
    conditioned,
    distilled,
    families,
    guessed,
    guided,
    images,
    modular,
    processors,
    sketched,
    unlisted,
    worded,
)
from zoo.pictures import draw_noise

from viditq.data.samples import load_sample, sample_path
from viditq.files import read_json
from viditq.models.adapter import ModelAdapter
from viditq.models.generate import _as_tensor, _call, generate, noise_generator, with_settings
from viditq.models.schedulers import make_scheduler
from viditq.models.step_noise import seeded_steps
from viditq.models.stored_embeds import read_embeds, write_embeds
from viditq.models.text import encode_prompt
from viditq.models.timestep_scale import levels_of, measured_scale
from viditq.models.trial import try_out
from viditq.prompt import Prompt
from viditq.quant import linear_names
from viditq.runner import run

SHRUNK = ["name=zoo", "model.height=32", "model.width=32", "model.dtype=float32"]
RUN = [
    *("quant=w4a8", "quant/smoothing=static", "data.num_prompts=2", "data.num_calibration_prompts=2", "batch_size=2"),
    *("metric=[psnr]", "noise_floor.num_prompts=0", "diagnosis.num_prompts=0", "logger=none", "model.num_steps=2"),
    "stages=[prompts,reference,calibrate,quantize,generate,evaluate]",
]
TEXTS = ("a small red circle", "a large blue square")
LAYERS = "+model.encode.text_encoder_out_layers=[1,2]"
LARGE = ["model.height=1024", "model.width=1024", "model.num_steps=1"]  # no other size is made


class Family(NamedTuple):
    """roles: Linears by role, counted by hand from the tiny denoiser's blocks. pictures: what a prompt comes with."""

    build: Callable[[], Any]
    roles: dict[str, int]
    overrides: Sequence[str] = ()
    pictures: tuple[str, ...] = ()


FLUX = {"joint_attention": 22, "mlp": 12}
FLUX3 = {"spatial_attention": 8, "joint_attention": 8, "text_refiner": 12, "mlp": 8}
FLUX2 = {"joint_attention": 16, "mlp": 12}
FAMILIES = {
    "flux_kontext": Family(
        conditioned.flux_kontext,
        {**FLUX, "float": 16},
        ["model.call.max_area=1024", "model.call._auto_resize=false"],
        ("image",),
    ),
    "flux_fill": Family(conditioned.flux_fill, {**FLUX, "float": 16}, [], ("image", "mask_image")),
    "flux2_dev": Family(families.flux2_dev, {**FLUX2, "float": 11}, [LAYERS], ("image",)),
    "flux2_klein_4b": Family(families.flux2_klein, {**FLUX2, "float": 9}, [LAYERS]),
    "flux2_klein_9b": Family(guided.flux2_klein, {**FLUX2, "float": 9}, [LAYERS, "model.guidance_scale=4"], ("image",)),
    "qwen_image_edit": Family(
        conditioned.qwen_image_edit, {"joint_attention": 16, "mlp": 8, "float": 10}, [], ("image",)
    ),
    "qwen_image_2.1": Family(families.qwen_image21, {"joint_attention": 8, "mlp": 6, "float": 8}),
    "hunyuan_image_2.1": Family(
        guided.hunyuan_image, {"text_refiner": 6, "joint_attention": 11, "mlp": 6, "float": 16}
    ),
    "hunyuan_image_2.1/distilled": Family(
        distilled.hunyuan_image, {"text_refiner": 6, "joint_attention": 11, "mlp": 6, "float": 20}
    ),
    "chroma": Family(unlisted.chroma, {**FLUX, "float": 7}),
    "ovis_image": Family(unlisted.ovis_image, {**FLUX, "float": 12}),
    "longcat_image": Family(families.longcat_image, {**FLUX, "float": 12}),
    "lumina2": Family(
        unlisted.lumina2, {"joint_attention": 8, "spatial_attention": 4, "text_refiner": 7, "mlp": 9, "float": 9}
    ),
    "sana_sprint": Family(
        families.sana_sprint, {"spatial_attention": 8, "cross_attention": 8, "float": 8}, ["model.num_steps=2"]
    ),
    "prx": Family(unlisted.prx, {"joint_attention": 6, "mlp": 6, "float": 8}),
    "prx_pixel": Family(unlisted.prx_pixel, {"joint_attention": 6, "mlp": 6, "float": 9}),
    "ernie_image": Family(unlisted.ernie_image, {"joint_attention": 8, "mlp": 6, "float": 6}),
    "glm_image": Family(sketched.glm_image, {"joint_attention": 8, "mlp": 4, "float": 13}),
    "hidream": Family(families.hidream, {"joint_attention": 12, "mlp": 21, "float": 12}, LARGE),
    "hidream/fast": Family(distilled.hidream, {"joint_attention": 12, "mlp": 21, "float": 12}, LARGE[:2]),
    "krea2": Family(guided.krea2, {"joint_attention": 8, "text_refiner": 14, "mlp": 6, "float": 12}),
    "ideogram4": Family(families.ideogram4, {"joint_attention": 16, "mlp": 12, "float": 18}, ["model.max_tokens=64"]),
    "aura_flow": Family(images.aura_flow, {"joint_attention": 12, "mlp": 9, "float": 9}),
    "hunyuan_dit": Family(guessed.hunyuan_dit, {"spatial_attention": 16, "cross_attention": 16, "mlp": 8, "float": 17}),
    "bria": Family(guessed.bria, {**FLUX, "float": 12}),
    "bria_fibo": Family(guessed.bria_fibo, {**FLUX, "float": 16}),
    "omnigen": Family(worded.omnigen, {"joint_attention": 8, "mlp": 4, "float": 6}),
    "flux3": Family(modular.flux3, {**FLUX3, "float": 25}, [LAYERS]),
    "flux3+image": Family(modular.flux3, {**FLUX3, "float": 25}, [LAYERS], ("image",)),
    "flux3_distilled": Family(modular.flux3_distilled, {**FLUX3, "float": 27}, [LAYERS]),
    "cogview4": Family(families.cogview4, {"joint_attention": 8, "mlp": 4, "float": 10}),
    "cogview3_plus": Family(families.cogview3, {"joint_attention": 8, "mlp": 4, "float": 10}),
    "bria_fibo2": Family(families.bria_fibo2, {"self_attention": 16, "cross_attention": 8, "mlp": 12, "float": 8}),
    "kandinsky5_image": Family(
        families.kandinsky5, {"self_attention": 4, "cross_attention": 4, "text_refiner": 6, "mlp": 2, "float": 9}, LARGE
    ),
}
PROCESSED = {
    "flux2_dev": processors.flux2_dev,
    "longcat_image": processors.longcat_image,
    "bria_fibo2": processors.bria_fibo2,
    "kandinsky5_image": processors.kandinsky5_image,
    "flux3": processors.flux3,
    "qwen_image_edit": processors.qwen_image_edit,
    "qwen_image_2.1": processors.qwen_image21,
}
FAMILIES |= {f"{name}+processor": FAMILIES[name]._replace(build=build) for name, build in PROCESSED.items()}
QUICK = ("flux_fill", "ideogram4", "sana_sprint", "omnigen")


def models(*quick: str) -> list[Any]:
    """All of them, slow those that are not `quick`."""
    real = pytest.mark.skipif(not is_torchvision_available(), reason="real processors need torchvision")
    marks = {name: [pytest.mark.slow] * (name not in quick) + [real] * ("+processor" in name) for name in FAMILIES}
    return [pytest.param(name, marks=marks[name]) for name in FAMILIES]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four pictures of noise, of one size."""
    return draw_noise(tmp_path_factory.mktemp("pictures"), [(str(i), 64, 64) for i in range(4)])


@pytest.fixture
def shrink(
    configure: Callable[..., Any], folder_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """(model, *overrides) -> the configuration, shrunk."""

    def shrink(model: str, *overrides: str) -> Any:
        if model.startswith("flux3") and "+processor" not in model:
            modular.with_processor(monkeypatch)
        if model == "omnigen" and not is_torchvision_available():
            worded.without_torchvision(monkeypatch)
        folder = folder_of(FAMILIES[model].build)
        paths = (f"model.path='{folder}'", f"cache_dir='{tmp_path}/cache'")
        return configure(f"model={model.partition('+')[0]}", *SHRUNK, *paths, *overrides, *FAMILIES[model].overrides)

    return shrink


def theirs(adapter: ModelAdapter, text: str, given: dict[str, Any]) -> torch.Tensor:
    """The sample of the pipeline's own call with the prompt as text."""
    whole = with_settings(adapter, adapter.load_complete())
    generator, kind = noise_generator(0, 3), "pt" if hasattr(whole, "vae") else "np"
    with seeded_steps(whole, [generator]):
        return _as_tensor(whole(prompt=text, **given, generator=generator, output_type=kind, return_dict=False)[0])


@pytest.mark.parametrize("model", models(*QUICK))
def test_samples_are_those_of_the_pipelines_own_call(
    model: str, shrink: Callable[..., Any], pictures: Path, tmp_path: Path
) -> None:
    """And depend on the prompt, on no batch mate, and come from embeddings as they are stored."""
    adapter: ModelAdapter = instantiate(shrink(model, "model.num_steps=3").model, _convert_="all")
    found = [*adapter.linear_roles(linear_names(adapter.build_denoiser())).values()]
    assert {role: found.count(role) for role in found} == FAMILIES[model].roles
    files = {name: pictures / f"{i}.png" for i, name in enumerate(FAMILIES[model].pictures)}
    text_part, pipeline = adapter.load_text_part(), adapter.load()
    for number, text in enumerate(TEXTS):
        prompt = Prompt(text, files) if files else text
        write_embeds(tmp_path / f"{number}.safetensors", encode_prompt(adapter, text_part, prompt))
    embeds = [read_embeds(tmp_path / f"{number}.safetensors", "") for number in range(2)]
    ours, second = (_call(adapter, pipeline, [one], [3], 0, "pt").float() for one in embeds)
    assert (ours - second).abs().max() > 1e-5
    both = generate(adapter, pipeline, embeds, [3, 3], 0).float()
    alone = (torch.cat([ours, second]).clamp(0, 1) * 255).round().reshape(both.shape)
    assert (both - alone).abs().max() <= 1
    given = {name: load_image(str(path)).convert("L" if "mask" in name else "RGB") for name, path in files.items()}
    expected = theirs(adapter, TEXTS[0], given).float()
    torch.testing.assert_close(ours, expected.reshape(ours.shape), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", models(*QUICK))
def test_the_noise_level_is_what_is_measured(model: str, shrink: Callable[..., Any]) -> None:
    adapter: ModelAdapter = instantiate(shrink(model, "model.num_steps=4").model, _convert_="all")
    steps = try_out(adapter, make_scheduler(adapter))
    levels = levels_of(steps, adapter.timestep_scale)
    assert 0.7 < levels[0] < 1 + 1e-5 and levels == sorted(levels, reverse=True) and levels[-1] >= 0
    if model != "sana_sprint":  # its scheduler counts in angles
        assert levels == pytest.approx(levels_of(steps, measured_scale(adapter)), abs=1e-6)


@pytest.mark.parametrize("model", models("flux_fill", "ideogram4"))
def test_whole_run(model: str, shrink: Callable[..., Any], pictures: Path, tmp_path: Path) -> None:
    data = []
    if given := FAMILIES[model].pictures:
        rows = [f"{text},{','.join(f'{pictures}/{i}.png' for i, _ in enumerate(given))}" for text in TEXTS]
        (tmp_path / "table.csv").write_text("\n".join([f"prompt,{','.join(given)}", *rows]))
        columns = ",".join(f"{name}: {name}" for name in given)
        data = ["data=image_prompts", f"data.path='{tmp_path}/table.csv'", f"data.conditions={{{columns}}}"]
    metrics = run(shrink(model, *RUN, *data), tmp_path / "run")
    assert metrics is not None and 0 < metrics["metrics"]["psnr"] < 100
    assert 4 < metrics["average_weight_bits"] < 16
    clip = load_sample(sample_path(tmp_path / "run" / "samples", 0, "image"))
    assert clip.float().std() > 1
    layers = read_json(tmp_path / "run" / "quantized" / "plan.json")["layers"]
    assert len(layers) == sum(count for role, count in FAMILIES[model].roles.items() if role != "float")
