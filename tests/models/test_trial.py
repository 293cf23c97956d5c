"""Pipelines tried out without weights: which steps they take, what denoisers are told, which schedulers they refuse."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from zoo import images, videos
from zoo.saving import save

from viditq.errors import UserError
from viditq.models import schedule
from viditq.models.adapter import ModelAdapter
from viditq.models.generate import denoise
from viditq.models.schedulers import make_scheduler
from viditq.models.text import encode_prompt
from viditq.models.timestep_scale import check_levels, levels_of, measured_scale
from viditq.models.trial import Step, TrialError, try_out

Make = Callable[..., ModelAdapter]
SIZES = ("model.height=32", "model.width=32", "model.dtype=float32", "name=x")
KNOWN = {
    "pixart_alpha": (images.pixart_alpha, []),
    "latte": (videos.latte, ["model.num_frames=4"]),
    "dit_xl2_256": (images.dit_xl2_256, []),
    "wan2.2": (videos.wan22, ["model.num_frames=5"]),
    "wan2.2_5b": (videos.wan22_5b, ["model.num_frames=5"]),
    "flux_dev": (images.flux_dev, []),
    "cogvideox_2b": (videos.cogvideox_2b, ["model.num_frames=9"]),
    "sd3.5": (images.sd35, []),
    "sana": (images.sana, []),
    "hunyuan_video": (videos.hunyuan_video, ["model.num_frames=5"]),
    "ltx_video": (videos.ltx_video, ["model.num_frames=9"]),
    "qwen_image": (images.qwen_image, []),
    "z_image": (images.z_image, []),
}


@pytest.fixture(scope="module")
def make(configure: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """(model, builder, *overrides) -> the adapter of a tiny pipeline."""
    root = tmp_path_factory.mktemp("models")

    def make(model: str, build: Callable[[], Any], *overrides: str) -> ModelAdapter:
        folder = root / build.__name__
        if not folder.exists():
            save(build, folder)
        cfg = configure(f"model={model}", f"model.path='{folder}'", *SIZES, "model.num_steps=3", *overrides)
        return instantiate(cfg.model, _convert_="all")

    return make


def told_while_sampling(adapter: ModelAdapter) -> list[float]:
    """What the real denoisers are told, step by step, in a real call with real embeddings."""
    pipeline, told = adapter.load_complete(), []

    def note(_: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        told.append(float(torch.as_tensor(kwargs.get(adapter.timestep_argument, [*args, None, None][1])).flatten()[0]))

    for name in adapter.denoiser_names:
        getattr(pipeline, name).register_forward_pre_hook(note, with_kwargs=True)
    denoise(adapter, pipeline, [encode_prompt(adapter, pipeline, "1")], [0], 0)
    return list(dict.fromkeys(told))  # guidance tells it twice


# Slow: schedules of a kind that another of them has.
SECOND = ("latte", "sana", "wan2.2_5b", "hunyuan_video")


@pytest.mark.parametrize("model", [pytest.param(m, marks=[pytest.mark.slow] * (m in SECOND)) for m in KNOWN])
def test_steps_are_those_of_sampling(model: str, make: Make) -> None:
    build, own = KNOWN[model]
    adapter = make(model, build, *own)
    steps = try_out(adapter, make_scheduler(adapter))
    assert list(dict.fromkeys(step.told for step in steps)) == told_while_sampling(adapter)
    levels = schedule.noise_levels(adapter)
    assert levels == pytest.approx(list(dict.fromkeys(step.level for step in steps)), abs=2e-3)
    assert levels == sorted(levels, reverse=True) and len(levels) == 3


# Scales ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "own", "scale"),
    [
        (images.aura_flow, [], 1.0),
        (images.flux_dev, [], 1.0),
        (images.qwen_image, [], 1.0),
        (images.sd35, ["model.num_steps=1"], 1000.0),
        (images.pixart_alpha, [], 1000.0),
        (videos.wan22, ["model.num_frames=5"], 1000.0),
        (videos.cogvideox_2b, ["model.num_frames=9"], 1000.0),
        (images.z_image, ["+model.list_embeds=true"], {"at_noise": 0.0, "at_clean": 1.0, "argument": "t"}),
    ],
)
def test_the_scale_of_a_pipeline_without_a_yaml(
    build: Callable[[], Any], own: list[str], scale: Any, make: Make
) -> None:
    adapter = make("diffusers", build, *own)
    assert adapter.timestep_scale == scale
    assert ModelAdapter.from_dict(adapter.to_dict()) == adapter


@pytest.mark.parametrize(
    ("told", "scale"),
    [
        ([13.5, 10.125, 1.35], 13.5),
        ([999.0, 749.0, 101.0], 1000.0),  # whole numbers
        ([1000.0, 748.0, 100.5], 1000.0),  # as bfloat16 rounds them
        ([0.001, 0.00075, 0.0001], 0.001),
        ([-3.0, -2.0, 0.6], {"at_noise": -3.0, "at_clean": 1.0, "argument": "timestep"}),
    ],
)
def test_scales_of_what_is_told(told: list[float], scale: Any, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [Step("timestep", *pair) for pair in zip(told, (1.0, 0.75, 0.1), strict=True)]
    monkeypatch.setattr("viditq.models.timestep_scale.try_out", lambda *_: steps)
    assert measured_scale(make("pixart_alpha", images.pixart_alpha)) == scale


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (
            [(3.0, 80.0), (0.5, 1.0), (-1.5, 0.002)],
            r"noise levels 80 to 0\.002, outside of \[0, 1\].*model\.timestep_scale",
        ),
        ([(1.0, 0.001), (0.5, 0.0005), (0.1, 0.0001)], "all sampling steps lie at one noise level"),
        ([(1.0, 1.0), (0.9, 0.5), (0.1, 0.1)], r"not in proportion to the noise level \(1 at 1, 0\.9 at 0\.5"),
        ([(0.3, 1.0), (0.3, 0.5), (0.3, 0.1)], "not in proportion"),
    ],
)
def test_what_is_no_scale(
    pairs: list[tuple[float, float]], message: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [Step("timestep", *pair) for pair in pairs]
    monkeypatch.setattr("viditq.models.timestep_scale.try_out", lambda *_: steps)
    with pytest.raises(UserError, match=message):
        measured_scale(make("pixart_alpha", images.pixart_alpha))


def test_a_pipeline_that_cannot_be_tried_out(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise TrialError("KeyError: 'image'")

    adapter = make("pixart_alpha", images.pixart_alpha)
    for module in ("timestep_scale", "schedule"):
        monkeypatch.setattr(f"viditq.models.{module}.try_out", fail)
    with pytest.raises(UserError, match=r"cannot be measured \(KeyError: 'image'\).*model\.timestep_scale=1000"):
        measured_scale(adapter)
    assert schedule.noise_levels(adapter) is None


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (1000.0, "timestep_scale=1000.0, all sampling steps lie at one noise level, 0.001 to"),
        (0.5, "outside of"),
        ({"at_noise": 0.0, "at_clean": 1e6}, "all sampling steps lie at one noise level"),
    ],
)
def test_a_scale_that_sampling_contradicts(scale: Any, message: str, make: Make) -> None:
    adapter = replace(make("diffusers", images.aura_flow), timestep_scale=scale)
    with pytest.raises(UserError, match=message):
        schedule.noise_levels(adapter)


def test_levels() -> None:
    steps = [Step("t", told, 0.0) for told in (0.0, 0.0, 0.25, 1.0)]
    assert levels_of(steps, {"at_noise": 0.0, "at_clean": 1.0}) == [1.0, 0.75, 0.0]
    check_levels([0.999], "one step")


# Schedulers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("wan2.2", {"scheduler": "FlowMatchEulerDiscreteScheduler", "scheduler_settings": {"shift": 8.0}}),
        ("wan2.2", {"scheduler": "FlowMatchHeunDiscreteScheduler"}),
        ("flux_dev", {"scheduler_settings": {"base_shift": 0.6}}),
        ("qwen_image", {"scheduler_settings": {"shift_terminal": 0.02}}),
        ("ltx_video", {"scheduler_settings": {"use_karras_sigmas": True}}),
        ("sd3.5", {"scheduler_settings": {"shift": 5.0}}),
        ("sd3.5", {"scheduler_settings": {"use_dynamic_shifting": True}}),
        ("hunyuan_video", {"scheduler_settings": {"shift": 3.0}}),
        ("z_image", {"scheduler_settings": {"use_dynamic_shifting": True}}),
        ("sana", {"scheduler": "FlowMatchEulerDiscreteScheduler"}),
        ("pixart_alpha", {"scheduler": "DDIMScheduler"}),
    ],
)
def test_what_the_pipeline_samples_is_not_refused(model: str, changes: dict[str, Any], make: Make) -> None:
    build, own = KNOWN[model]
    adapter = replace(make(model, build, *own), **changes)
    steps = try_out(adapter, make_scheduler(adapter))
    assert list(dict.fromkeys(step.told for step in steps)) == told_while_sampling(adapter)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("wan2.2", {"scheduler_settings": {"use_dynamic_shifting": True}}, "UniPC.* has no such|mu"),
        (
            "wan2.2",
            {"scheduler": "FlowMatchEulerDiscreteScheduler", "scheduler_settings": {"use_dynamic_shifting": True}},
            "FlowMatchEulerDiscreteScheduler cannot sample this model: ValueError: `mu` must be passed",
        ),
        ("pixart_alpha", {"scheduler": "FlowMatchEulerDiscreteScheduler"}, "init_noise_sigma"),
        ("flux_dev", {"scheduler": "DDIMScheduler"}, "DDIMScheduler cannot sample this model: .*"),
    ],
)
def test_what_the_pipeline_does_not_sample_is_refused(
    model: str, changes: dict[str, Any], message: str, make: Make
) -> None:
    build, own = KNOWN[model]
    with pytest.raises(UserError, match=message):
        replace(make(model, build, *own), **changes)
