"""Pipelines that sample from a picture: real classes, random weights."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils import load_image
from hydra.utils import instantiate
from PIL import Image
from zoo import conditioned, conditioned_more, guessed, guessed_videos, images, sketched, videos_2026
from zoo.pictures import draw_noise

from viditq.errors import UserError
from viditq.files import read_json
from viditq.loading import load_quantized
from viditq.models.adapter import ModelAdapter
from viditq.models.conditions import check_conditions
from viditq.models.generate import _as_tensor, _call, noise_generator, with_settings
from viditq.models.schedulers import make_scheduler
from viditq.models.step_noise import seeded_steps
from viditq.models.stored_embeds import read_embeds, write_embeds
from viditq.models.text import encode_prompt
from viditq.models.trial import try_out
from viditq.prompt import Prompt, frames_of
from viditq.quant import linear_names
from viditq.runner import run

SHRUNK = ["name=x", "model=diffusers", "model.num_steps=2", "model.height=32", "model.width=32"]
CLIP = "model.num_frames=5"
LARGE = ["model.num_steps=1"]  # no other size is made
HELIOS = {"self_attention": 8, "cross_attention": 8, "mlp": 4, "float": 6}
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
FORCED = {"self_attention": 8, "cross_attention": 8, "mlp": 4, "float": 8}
EDIT = '{"edit_instruction": "a small red circle"}'
# name -> builder, overrides, Linears by role, what is given: pictures, and clips by the number of their frames
MORE: dict[str, tuple[Callable[[], Any], list[str], dict[str, int], dict[str, int | None]]] = {
    "anyflow_far": (
        guessed_videos.anyflow_far,
        [CLIP],
        {"self_attention": 8, "cross_attention": 8, "mlp": 4, "float": 8},
        {"video": None},
    ),
    "anyflow_far+clip": (
        guessed_videos.anyflow_far,
        ["model.num_frames=9", "+model.call.chunk_partition=[2,1]"],
        {"self_attention": 8, "cross_attention": 8, "mlp": 4, "float": 8},
        {"video": 5},
    ),
    "anyflow": (
        guessed_videos.anyflow,
        ["model.num_frames=9"],
        {"self_attention": 8, "cross_attention": 8, "mlp": 4, "float": 8},
        {"video": 5},
    ),
    "helios": (guessed_videos.helios, ["model.num_frames=33"], HELIOS, {"image": None}),
    "helios+clip": (guessed_videos.helios, ["model.num_frames=33"], HELIOS, {"video": 33}),
    "helios_pyramid": (
        conditioned_more.helios_pyramid,
        ["model.num_frames=33", "model.num_steps=7", "model.height=64", "model.width=64"],
        HELIOS,
        {"image": None},
    ),
    "helios_distilled": (
        conditioned_more.helios_distilled,
        ["model.num_frames=33", "model.num_steps=6", "model.height=64", "model.width=64", "model.guidance_scale=1"],
        HELIOS,
        {},
    ),
    "motif_video_i2v": (
        conditioned_more.motif_video_i2v,
        [CLIP],
        {"joint_attention": 11, "mlp": 6, "float": 11},
        {"image": None},
    ),
    "easyanimate_inpaint": (
        conditioned_more.easyanimate_inpaint,
        [CLIP, "+model.encode.negative_prompt=''"],
        {"joint_attention": 12, "mlp": 6, "float": 9},
        {"video": 5, "mask_video": 5},
    ),
    "bria_fibo_edit": (
        conditioned_more.bria_fibo_edit,
        [],
        {"joint_attention": 22, "mlp": 12, "float": 16},
        {"image": None},
    ),
    "bria_fibo_edit+mask": (
        conditioned_more.bria_fibo_edit,
        [],
        {"joint_attention": 22, "mlp": 12, "float": 16},
        {"image": None, "mask": None},
    ),
    "longcat_image_edit": (
        conditioned_more.longcat_image_edit,
        LARGE,
        {"joint_attention": 22, "mlp": 12, "float": 12},
        {"image": None},
    ),
    "wan_animate": (
        videos_2026.wan_animate,
        [CLIP, "+model.call.mode=replace"],
        {"self_attention": 8, "cross_attention": 12, "mlp": 4, "float": 13},
        {"image": None, "pose_video": 5, "face_video": 5, "background_video": 5, "mask_video": 5},
    ),
    "skyreels_v2_forcing": (conditioned_more.skyreels_v2_forcing, [CLIP], FORCED, {}),
    "skyreels_v2_forcing_i2v": (conditioned_more.skyreels_v2_forcing_i2v, [CLIP], FORCED, {"image": None}),
    "skyreels_v2_forcing_v2v": (
        conditioned_more.skyreels_v2_forcing_v2v,
        ["model.num_frames=9", "+model.call.overlap_history=5"],
        FORCED,
        {"video": 5},
    ),
}
QUICK = (conditioned.wan_i2v, conditioned.wan22_i2v, conditioned.flux_kontext, guessed_videos.sana_wm)
QUICK_MORE = ("easyanimate_inpaint",)  # a tensor; slow: an encoder that stays, and further classes
CASES = {b.__name__: (b, own, roles, dict.fromkeys(names)) for b, (own, roles, names) in KNOWN.items()}
SLOW = {build.__name__ for build in KNOWN if build not in QUICK} | {name for name in MORE if name not in QUICK_MORE}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four pictures of noise, of two sizes."""
    return draw_noise(tmp_path_factory.mktemp("pictures"), [(str(i), 40, 40 + 8 * (i % 2)) for i in range(4)])


def drawn(folder: Path, given: dict[str, int | None]) -> dict[str, Path]:
    """A picture of noise, or a folder of so many frames, for each argument; in order the same for the same sizes."""
    sizes = [(f"{name}/{i:02d}" if count else name, 64, 64) for name, count in given.items() for i in range(count or 1)]
    draw_noise(folder, sizes)
    for mask in (folder / f"{name}.png" for name, *_ in sizes if "mask" in name):
        half = Image.new("L", (64, 64))
        half.paste(255, (32, 0, 64, 64))
        half.save(mask)
    return {name: folder / name if count else folder / f"{name}.png" for name, count in given.items()}


def as_the_pipeline_takes_it(build: Callable[[], Any], name: str, path: Path) -> Any:
    """What a user of the pipeline itself would give it."""
    frames = [load_image(str(file)).convert("L" if "mask" in name else "RGB") for file in frames_of(path)]
    anyflow = build in (guessed_videos.anyflow, guessed_videos.anyflow_far)
    if anyflow or build is conditioned_more.easyanimate_inpaint:
        pixels = torch.stack([torch.from_numpy(np.array(frame)).float() for frame in frames])
        pixels = pixels[..., None] if "mask" in name else pixels / 255
        return pixels.movedim(-1, 1 if anyflow else 0)[None]
    return frames if path.is_dir() or "video" in name else frames[0]


@pytest.mark.parametrize("case", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES | MORE])
def test_samples_are_those_of_the_pipelines_own_call(
    case: str, configure: Callable[..., Any], folder_of: Any, tmp_path: Path
) -> None:
    """And depend on what is given."""
    build, own, roles, names = (CASES | MORE)[case]
    cfg = configure(*SHRUNK, *own, f"model.path='{folder_of(build)}'").model
    adapter: ModelAdapter = instantiate(cfg, _convert_="all")
    found = [*adapter.linear_roles(linear_names(adapter.build_denoiser())).values()]
    assert {role: found.count(role) for role in dict.fromkeys(found)} == roles
    text = EDIT if build is conditioned_more.bria_fibo_edit else TEXT
    files = drawn(tmp_path, names)
    first = next(iter(names), "")
    other_files = drawn(tmp_path / "other", {"unlike": 1, first: names[first]}) if names else {}
    text_part, pipeline = adapter.load_text_part(), adapter.load()
    prompts: list[str] = (
        [Prompt(text, files), Prompt(text, {**files, first: other_files[first]})] if names else [text, "a blue square"]
    )
    for number, prompt in enumerate(prompts):
        write_embeds(tmp_path / f"{number}.safetensors", encode_prompt(adapter, text_part, prompt))
    embeds = [read_embeds(tmp_path / f"{number}.safetensors", "") for number in range(2)]
    ours, other = (_call(adapter, pipeline, [one], [3], 0, "pt") for one in embeds)
    whole = with_settings(adapter, adapter.load_complete())
    given = {name: as_the_pipeline_takes_it(build, name, path) for name, path in files.items()}
    if (negative := adapter.encode.get("negative_prompt")) is not None:
        given["negative_prompt"] = negative
    generator = noise_generator(0, 3)
    with seeded_steps(whole, [generator]):  # JoyImage-Edit draws its picture's latents from the global generator
        out = whole(prompt=text, **given, generator=generator, output_type="pt", return_dict=False)[0]
    torch.testing.assert_close(ours.float(), _as_tensor(out).reshape(ours.shape).float(), rtol=0, atol=1e-5)
    assert (ours - other).abs().max() > 1e-6  # of one noise, two pictures
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


def test_pipelines_whose_own_call_fails_are_refused_by_name(configure: Any, folder_of: Any, pictures: Path) -> None:
    """EasyAnimate's control at once, GLM-Image as soon as a picture is given."""
    for build, why in {
        conditioned_more.easyanimate_control: r"EasyAnimateControlPipeline cannot be run: .*text_encoder_index.*Take",
    }.items():
        with pytest.raises(Exception, match=why):
            instantiate(configure(*SHRUNK, f"model.path='{folder_of(build)}'").model, _convert_="all")
    path = f"model.path='{folder_of(sketched.glm_image)}'"
    with pytest.raises(Exception, match=r"conditions has 'image'; GlmImagePipeline: with a picture its own call fails"):
        instantiate(configure(*SHRUNK, path, "+model.conditions=[image]").model, _convert_="all")
    adapter: ModelAdapter = instantiate(configure(*SHRUNK, path).model, _convert_="all")
    assert adapter.replays and adapter.conditions == []
    with pytest.raises(UserError, match=r"takes these pictures: none .*with a picture its own call fails"):
        check_conditions(adapter, [Prompt(TEXT, {"image": pictures / "0.png"})])


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
