"""Pipelines that sample from a picture: real classes, random weights."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.utils import load_image
from hydra.utils import instantiate
from zoo import conditioned, guessed, guessed_videos, images
from zoo.pictures import draw_noise

from viditq.errors import UserError
from viditq.files import read_json
from viditq.loading import load_quantized
from viditq.models.adapter import ModelAdapter
from viditq.models.generate import _as_tensor, _call, generate, noise_generator, with_settings
from viditq.models.schedulers import make_scheduler
from viditq.models.step_noise import seeded_steps
from viditq.models.stored_embeds import read_embeds, write_embeds
from viditq.models.text import encode_prompt
from viditq.models.trial import try_out
from viditq.prompt import Prompt
from viditq.quant import linear_names
from viditq.runner import run

SHRUNK = ["name=x", "model=diffusers", "model.num_steps=2", "model.height=32", "model.width=32"]
CLIP = "model.num_frames=5"
TEXT = "a small red circle"
# builder -> overrides, Linears by role, the pictures that are given
KNOWN: dict[Callable[[], Any], tuple[list[str], dict[str, int], list[str]]] = {
    conditioned.wan_i2v: ([CLIP], {"self_attention": 8, "cross_attention": 12, "mlp": 4, "float": 8}, ["image"]),
    conditioned.wan22_i2v: (
        [CLIP],
        {"self_attention": 16, "cross_attention": 16, "mlp": 8, "float": 12},
        ["image", "last_image"],
    ),
    conditioned.flux_kontext: (
        ["+model.call.max_area=1024", "+model.call._auto_resize=false"],
        {"joint_attention": 22, "mlp": 12, "float": 16},
        ["image"],
    ),
    conditioned.framepack: (
        ["model.height=64", "model.width=64", "+model.call.num_frames=33", "+model.call.latent_window_size=2"],
        {"joint_attention": 11, "mlp": 6, "text_refiner": 6, "float": 19},
        ["image"],
    ),
    guessed_videos.chronoedit: (
        [CLIP],
        {"self_attention": 8, "cross_attention": 12, "mlp": 4, "float": 8},
        ["image"],
    ),
    guessed_videos.consisid: (["model.num_frames=9"], {"self_attention": 8, "mlp": 4, "float": 9}, ["image"]),
    guessed_videos.sana_wm: (
        [CLIP, "+model.call.action=w-4", "+model.call.intrinsics=[40,40,32,32]"],
        {"self_attention": 12, "cross_attention": 6, "float": 14},
        ["image"],
    ),
    guessed.joyimage_edit: (
        ["model.height=1024", "model.width=1024"],
        {"joint_attention": 8, "mlp": 8, "float": 6},
        ["image"],
    ),
}
QUICK = (conditioned.wan_i2v, conditioned.wan22_i2v, conditioned.flux_kontext, guessed_videos.sana_wm)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four pictures of noise, of two sizes."""
    return draw_noise(tmp_path_factory.mktemp("pictures"), [(str(i), 40, 40 + 8 * (i % 2)) for i in range(4)])


@pytest.mark.parametrize(
    "build",
    [pytest.param(b, id=b.__name__, marks=[pytest.mark.slow] * (b not in QUICK)) for b in KNOWN],
)
def test_samples_are_those_of_the_pipelines_own_call(
    build: Callable[[], Any], configure: Callable[..., Any], folder_of: Any, pictures: Path, tmp_path: Path
) -> None:
    own, roles, arguments = KNOWN[build]
    cfg = configure(*SHRUNK, *own, f"model.path='{folder_of(build)}'").model
    adapter: ModelAdapter = instantiate(cfg, _convert_="all")
    found = [*adapter.linear_roles(linear_names(adapter.build_denoiser())).values()]
    assert {role: found.count(role) for role in dict.fromkeys(found)} == roles
    files = {name: pictures / f"{i}.png" for i, name in enumerate(arguments)}
    text_part, pipeline = adapter.load_text_part(), adapter.load()
    for number, prompt in enumerate([Prompt(TEXT, files), Prompt(TEXT, {**files, "image": pictures / "3.png"})]):
        write_embeds(tmp_path / f"{number}.safetensors", encode_prompt(adapter, text_part, prompt))
    embeds = [read_embeds(tmp_path / f"{number}.safetensors", "") for number in range(2)]
    ours = _call(adapter, pipeline, [embeds[0]], [3], 0, "pt")
    whole = with_settings(adapter, adapter.load_complete())
    given = {name: load_image(str(path)) for name, path in files.items()}
    generator = noise_generator(0, 3)
    with seeded_steps(whole, [generator]):  # JoyImage-Edit draws its picture's latents from the global generator
        out = whole(prompt=TEXT, **given, generator=generator, output_type="pt", return_dict=False)[0]
    torch.testing.assert_close(ours.float(), _as_tensor(out).reshape(ours.shape).float(), rtol=0, atol=1e-5)
    first, second = generate(adapter, pipeline, embeds, [3, 3], 0).float()  # of one text and one noise, two pictures
    assert (first - second).abs().max() > 0
    told = [step.told for step in try_out(adapter, make_scheduler(adapter))]
    assert told == sorted(told, reverse=True) and len(told) >= 2


def test_a_whole_run(configure: Callable[..., Any], folder_of: Any, pictures: Path, tmp_path: Path) -> None:
    data = ("data=prompt_file", f"data.path='{tmp_path / 'prompts.txt'}'", f"data.images='{pictures}'")
    (tmp_path / "prompts.txt").write_text(f"{TEXT}\n" * 3)
    shrunk = [*SHRUNK, CLIP, "quant=w4a8", "metric=[psnr]", "logger=none", "batch_size=2", "data.num_prompts=2"]
    shrunk += ["noise_floor.num_prompts=0", "diagnosis.num_prompts=1", "quant/smoothing=static"]
    stages = "stages=[prompts,reference,calibrate,quantize,generate,diagnose,evaluate,report]"
    paths = [f"model.path='{folder_of(conditioned.wan_i2v)}'", f"cache_dir='{tmp_path}/cache'"]
    metrics = run(configure(*shrunk, stages, *paths, *data), tmp_path / "run")
    assert metrics is not None and 0 < metrics["metrics"]["psnr"] < 100
    assert len([*(tmp_path / "cache" / "prompts").glob("*/[!s]*.safetensors")]) == 3  # one text, three pictures
    per_prompt = read_json(tmp_path / "run" / "per_prompt.json")
    assert per_prompt["prompts"] == [TEXT] * 2
    assert per_prompt["conditions"] == [{"image": str(pictures / f"{i}.png")} for i in range(2)]
    assert (tmp_path / "run" / "report.html").read_text().count('alt="given picture, which sampling starts from"') == 2
    assert len([*(tmp_path / "cache" / "reference").iterdir()]) == 1
    stages = "stages=[prompts,reference]"
    run(configure(*shrunk, stages, *paths, *data[:2], f"data.images='{pictures / '0.png'}'"), tmp_path / "run2")
    assert len([*(tmp_path / "cache" / "reference").iterdir()]) == 2
    frames = load_quantized(tmp_path / "run")(
        prompt=TEXT,
        image=load_image(str(pictures / "0.png")),
        generator=noise_generator(0, 0),
        output_type="pt",
        return_dict=False,
    )[0]
    assert frames.shape == (1, 5, 3, 32, 32)


@pytest.mark.parametrize(
    ("build", "own", "message"),
    [
        (conditioned.wan_i2v, [CLIP], r"WanImageToVideoPipeline samples from a picture: image, and the prompt .* none"),
        (images.flux_dev, ["data.images={}"], r"comes with image; FluxPipeline takes these pictures: none"),
    ],
)
def test_prompts_without_or_with_too_many_pictures(
    build: Any, own: list[str], message: str, configure: Any, folder_of: Any, pictures: Path, tmp_path: Path
) -> None:
    given = [one.replace("{}", f"'{pictures}'") for one in own]
    cfg = configure(*SHRUNK, "data.num_prompts=2", "quant=w4a8", f"model.path='{folder_of(build)}'", *given)
    with pytest.raises(UserError, match=message):
        run(cfg, tmp_path / "run")


def test_conditions_that_the_call_does_not_take(configure: Any, folder_of: Any) -> None:
    path = f"model.path='{folder_of(images.flux_dev)}'"
    with pytest.raises(Exception, match=r"model\.conditions has 'image'; FluxPipeline takes these pictures: none"):
        instantiate(configure(*SHRUNK, path, "+model.conditions=[image]").model, _convert_="all")


class Editing:
    """A pipeline whose call prepares the picture before `encode_prompt` looks at it, and encodes a negative prompt."""

    def encode_prompt(self, prompt: Any, image: Any = None, prompt_embeds: Any = None) -> tuple[torch.Tensor, None]:
        return torch.full((1, 2, 3), float(len(prompt) * image.width)), None

    def __call__(
        self,
        image: Any = None,
        prompt: Any = None,
        height: int = 8,
        negative_prompt: str = "",
        negative_prompt_embeds: Any = None,
        num_inference_steps: int = 4,
    ) -> None:
        small = image.resize((height, height))
        self.encode_prompt(prompt, small)
        self.encode_prompt(negative_prompt, small)
        pytest.fail("all is encoded")


def test_what_looks_at_pictures_is_encoded_by_the_pipelines_own_call(pictures: Path) -> None:
    adapter: Any = SimpleNamespace(
        **{"conditioning": "text", "encode_outputs": ["prompt_embeds", None], "negative_prompt": "ab", "encode": {}},
        **{"num_steps": 2, "guidance_argument": "guidance_scale", "guidance_scale": None, "height": 5, "width": None},
        **{"modality": "image", "call": {}, "pipeline": "Editing", "replays": False},
    )
    embeds = encode_prompt(adapter, Editing(), Prompt("abc", {"image": pictures / "0.png"}))
    assert embeds.keys() == {"prompt_embeds", "negative_prompt_embeds", "condition:image"}
    assert embeds["prompt_embeds"].unique().tolist() == [15] and embeds["negative_prompt_embeds"][0, 0, 0] == 10
    with pytest.raises(UserError, match="Editing cannot encode 'abc' with its pictures"):
        adapter.height = "x"
        encode_prompt(adapter, Editing(), Prompt("abc", {"image": pictures / "0.png"}))
