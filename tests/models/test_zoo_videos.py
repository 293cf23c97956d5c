"""The video models of 2025 and 2026 in conf/model, on tiny random pipelines of their real classes."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from diffusers.utils import load_image
from hydra.utils import instantiate
from zoo import conditioned, cosmos, distilled, guided, sound, unlisted, videos, worded
from zoo import videos_2026 as zoo
from zoo.pictures import draw_noise

from viditq.data.samples import load_sample, load_sound, sample_path, sound_path
from viditq.files import read_json
from viditq.models.adapter import ModelAdapter
from viditq.models.generate import _as_tensor, noise_generator, with_settings
from viditq.models.timestep_scale import measured_scale
from viditq.prompt import frames_of
from viditq.quant import linear_names
from viditq.quant.calibration.context import TimestepScale
from viditq.runner import run

TEXT = "a small red circle"


@dataclass(frozen=True)
class Case:
    """A builder, Linears by role, the conditions that are given, clips' frames and size, whether they are settings,
    and the steps, of which some checkpoints name each.
    """

    build: Callable[[], Any]
    roles: dict[str, int]
    given: tuple[str, ...] = ()
    frames: int = 5
    size: int = 32
    sized: bool = True
    steps: int = 2


WAN = {"self_attention": 8, "cross_attention": 8, "mlp": 4, "float": 6}
WAN_IMAGE = {**WAN, "cross_attention": 12, "float": 8}
HUNYUAN = {"joint_attention": 8, "mlp": 4, "text_refiner": 6, "float": 17}
LTX2 = {"self_attention": 8, "cross_attention": 16, "mlp": 4, "float": 54}
KANDINSKY = {"self_attention": 8, "cross_attention": 8, "mlp": 4, "text_refiner": 6, "float": 10}
KANDINSKY6 = {"self_attention": 8, "cross_attention": 16, "mlp": 4, "text_refiner": 6, "float": 58}
COSMOS3 = {"joint_attention": 16, "mlp": 12, "float": 7}
SANA = {"self_attention": 8, "cross_attention": 8, "float": 6}
MODELS = {
    "wan2.1_i2v_480p": Case(conditioned.wan_i2v, WAN_IMAGE, ("image",)),
    "wan2.1_flf2v": Case(zoo.wan_flf2v, WAN_IMAGE, ("image", "last_image")),
    "wan2.1_i2v_720p": Case(conditioned.wan_i2v, WAN_IMAGE, ("image",)),
    "wan2.2_i2v": Case(conditioned.wan22_i2v, {role: 2 * n for role, n in WAN.items()}, ("image",)),
    "wan2.2_5b_i2v": Case(zoo.wan22_5b_i2v, WAN, ("image",)),
    "wan2.1_vace_1.3b": Case(zoo.wan_vace, {"self_attention": 16, "cross_attention": 16, "mlp": 8, "float": 9}),
    "wan2.1_vace_14b": Case(
        zoo.wan_vace,
        {"self_attention": 16, "cross_attention": 16, "mlp": 8, "float": 9},
        ("video", "mask", "reference_images"),
    ),
    "wan2.2_animate": Case(
        zoo.wan_animate, {**WAN_IMAGE, "cross_attention": 16, "float": 9}, ("image", "pose_video", "face_video")
    ),
    "skyreels_v2": Case(unlisted.skyreels_v2, WAN),
    "skyreels_v2_i2v": Case(zoo.skyreels_v2_i2v, WAN_IMAGE, ("image",)),
    "hunyuan_video15": Case(guided.hunyuan_video15, HUNYUAN),
    "hunyuan_video15_i2v": Case(zoo.hunyuan_video15_i2v, HUNYUAN, ("image",), size=16, sized=False),
    "hunyuan_video15_i2v/step_distilled": Case(
        distilled.hunyuan_video15_i2v, {**HUNYUAN, "float": 19}, ("image",), size=16, sized=False
    ),
    "ltx2": Case(zoo.ltx2, LTX2),
    "ltx2_i2v": Case(zoo.ltx2_i2v, LTX2, ("image",)),
    "ltx_video_i2v": Case(zoo.ltx_i2v, {**WAN, "float": 7}, ("image",), frames=9),
    "ltx_video/distilled": Case(distilled.ltx_video, {**WAN, "float": 7}, frames=9, steps=8),
    "kandinsky5": Case(zoo.kandinsky5, KANDINSKY),
    "kandinsky5_i2v": Case(zoo.kandinsky5_i2v, KANDINSKY, ("image",), frames=21),
    "cosmos2.5": Case(cosmos.cosmos25, {**WAN, "float": 19}),
    "cosmos2.5+image": Case(cosmos.cosmos25, {**WAN, "float": 19}, ("image",)),
    "cosmos2.5+video": Case(cosmos.cosmos25, {**WAN, "float": 19}, ("video",), frames=9),
    "cosmos3": Case(worded.cosmos3, COSMOS3),
    "cosmos3+image": Case(worded.cosmos3, COSMOS3, ("image",)),
    "cosmos3+video": Case(worded.cosmos3, COSMOS3, ("video",), frames=9),
    "cosmos3/edge": Case(worded.cosmos3_edge, {**COSMOS3, "mlp": 8}, ("image",)),
    "kandinsky6": Case(sound.kandinsky6, KANDINSKY6, ("image",)),
    "kandinsky6/distilled": Case(sound.kandinsky6_distilled, KANDINSKY6),
    "mochi": Case(unlisted.mochi, {"joint_attention": 15, "mlp": 6, "float": 12}, frames=7),
    "sana_video": Case(videos.sana_video, SANA),
    "sana_video_i2v": Case(zoo.sana_video_i2v, SANA, ("image",)),
    "cogvideox_5b_i2v": Case(zoo.cogvideox_i2v, {"joint_attention": 8, "mlp": 4, "float": 9}, ("image",), frames=9),
    "allegro": Case(zoo.allegro, WAN, frames=24, size=128),
}
SOUND = {"ltx2": "47 of its 47 Linears stay in float", "kandinsky6": "46 of its 46 Linears stay in float"}
QUICK = ("wan2.2_5b_i2v", "ltx2_i2v", "kandinsky5")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts with a picture, another one, and a clip of each length that is asked for."""
    names = ("first", "last", *(f"clip/{i}" for i in range(5)))
    folder = draw_noise(tmp_path_factory.mktemp("pictures"), [(name, 40, 48) for name in names])
    file = folder / "table.csv"
    file.write_text("prompt,picture,last,clip\n" + f"{TEXT},first.png,last.png,clip\n" * 2)
    return file


def _column(argument: str) -> str:
    return "clip" if "video" in argument or argument == "mask" else "last" if "last" in argument else "picture"


def _given(arguments: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """What the pipeline's own call is given."""
    files = {"picture": folder / "first.png", "last": folder / "last.png", "clip": folder / "clip"}
    given = {name: [load_image(str(f)) for f in frames_of(files[_column(name)])] for name in arguments}
    given = {k: [one.convert("L") for one in v] if "mask" in k else v for k, v in given.items()}
    return {name: value if _column(name) == "clip" else value[0] for name, value in given.items()}


def _overrides(case: Case, table: Path) -> list[str]:
    steps = [f"model.num_frames={case.frames}", f"model.num_steps={case.steps}", "model.dtype=float32"]
    sizes = ["model.height={0}", "model.width={0}"] if case.sized else []
    columns = ", ".join(f"{name}: {_column(name)}" for name in case.given)
    data = [f"data.path='{table}'", "data=image_prompts", f"data.conditions={{{columns}}}"]
    data = data if case.given else [f"data.path='{table}'", "data=prompt_file", "data.column=prompt"]
    return [*steps, *(size.format(case.size) for size in sizes), *data]


@pytest.mark.parametrize("model", [pytest.param(m, marks=[pytest.mark.slow] * (m not in QUICK)) for m in MODELS])
def test_whole_run(
    model: str,
    configure: Callable[..., Any],
    folder_of: Callable[..., Path],
    table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And the float sample is that of the pipeline's own call; what is guessed of roles and measured is as said."""
    case = MODELS[model]
    if model.startswith("cosmos2"):
        pytest.importorskip("torchvision", reason="the denoiser of Cosmos resizes with it")
        cosmos.guarded(monkeypatch)
    paths = [
        f"model={model.partition('+')[0]}",
        f"model.path='{folder_of(case.build)}'",
        f"cache_dir='{tmp_path}/cache'",
        "name=x",
    ]
    first = ["first_frame_psnr"] * ("i2v" in model)
    sound = SOUND.get(model.partition("/")[0].removesuffix("_i2v"))
    shrunk = [
        "quant=w4a8",
        f"metric=[{','.join(['psnr', *first, *['sound'] * (sound is not None)])}]",
        "logger=none",
        "batch_size=1",
        "data.num_prompts=2",
    ]
    shrunk += ["data.num_calibration_prompts=1", "noise_floor.num_prompts=0", "diagnosis.num_prompts=0"]
    shrunk += ["quant/smoothing=static", "stages=[prompts,reference,calibrate,quantize,generate,evaluate]"]
    cfg = configure(*paths, *shrunk, *_overrides(case, table))
    metrics = run(cfg, tmp_path / "run")
    assert metrics is not None and 0 < metrics["metrics"]["psnr"] < 100
    told = f"sound: kept beside the clips, judged by metric=sound; {sound or ''}"
    assert (told in capsys.readouterr().out) == (sound is not None) == ("log_mel" in metrics["metrics"])
    assert all(0 < metrics["metrics"][name] < 100 and metrics["verdict"][name]["float"] for name in first)
    adapter: ModelAdapter = instantiate(cfg.model, _convert_="all")
    measured, told = measured_scale(adapter), {"argument": adapter.timestep_argument}
    scales = [
        told | scale if isinstance(scale, dict) else told | {"at_noise": scale}
        for scale in (measured, adapter.timestep_scale)
    ]
    assert TimestepScale(**scales[0]) == TimestepScale(**scales[1])
    found = adapter.linear_roles(linear_names(adapter.build_denoiser()))
    assert Counter(found.values()) == case.roles
    whole = with_settings(adapter, adapter.load_complete())
    settings = {"generator": noise_generator(0, 0), "output_type": "pt", "return_dict": False}
    out = whole(prompt=TEXT, **_given(case.given, table.parent), **settings)
    reference = Path(read_json(tmp_path / "run" / "per_prompt.json")["reference"])
    ours = load_sample(sample_path(reference, 0, adapter.modality))
    assert ours.shape == (case.frames, 3, case.size, case.size) and ours.float().std() > 1
    theirs = (_as_tensor(out[0]).float().clamp(0, 1) * 255).round().reshape(ours.shape)  # Cosmos 3's has no batch axis
    assert (ours.float() - theirs).abs().max() <= 1
    if sound is not None:
        wave = load_sound(sound_path(reference, 0))[0]
        assert (wave - (out[1][0] * 32768).round()).abs().max() <= 1 and wave.float().std() > 1
