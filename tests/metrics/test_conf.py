"""Every file of conf/metric composes, alone and in its set, and builds a metric that labels itself."""

import copy
import inspect
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import get_class, get_method, instantiate
from omegaconf import DictConfig
from torch.nn import Identity

from viditq.errors import UserError
from viditq.metrics.clip_encoder import load_clip
from viditq.metrics.streaming import StreamingMetric

CONF = Path(__file__).parents[2] / "conf"
SETS = ("image", "video", "image_real", "video_real", "image_to_video", "edit", "sound")
SIDES = {"features", "clip", "network", "head"}
NAMES = sorted(path.stem for path in (CONF / "metric").glob("*.yaml") if path.stem not in SETS)


@cache
def _composed(name: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(f"metric/{name}").metric


def composed(name: str) -> DictConfig:
    """The node `metric` with this file alone, which a test may change."""
    return copy.deepcopy(_composed(name))


@pytest.mark.parametrize("name", NAMES)
def test_builds_of_parts_that_take_the_arguments_that_are_set(
    name, tiny_features, clip_folder, lpips_of, image_reward, head_of
):
    node = composed(name)[name]
    for part in SIDES & set(node):
        arguments = {key for key in node[part] if key != "_target_"}
        assert arguments <= set(inspect.signature(get_method(node[part]._target_)).parameters)
    networks = {"lpips": lpips_of("alex"), "image_reward": image_reward, "dover": Identity()}
    parts = {"features": tiny_features, "clip": load_clip(str(clip_folder)), "head": head_of(16)}
    parts["network"] = networks.get(name)
    metric = instantiate(node, **{key: part for key, part in parts.items() if key in node})
    assert isinstance(metric, StreamingMetric) and isinstance(metric, get_class(node._target_))
    assert metric.name and isinstance(metric.unit, str) and metric.higher_is_better in (True, False, None)


WITH_FILES = {
    "lpips": ("download.pytorch.org/models/alexnet-owt-7be5be79.pth", "ssim and relative_l2"),
    "fid_inception": ("weights-inception-2015-12-05-6726825d.pth", "metric=fid "),
    "kid_inception": ("weights-inception-2015-12-05-6726825d.pth", "metric=fid "),
    "fvd_i3d": ("i3d_torchscript.pt", "metric=fvd "),
    "image_reward": ("THUDM/ImageReward", "metric=pick_score"),
    "aesthetic": ("improved-aesthetic-predictor", "metric=clip_iqa"),
    "dover": ("VQAssessment/DOVER", "metric=flicker"),
}


@pytest.mark.parametrize("name", WITH_FILES)
@pytest.mark.parametrize("file", [None, "nowhere/file.pth"])
def test_a_missing_file_is_one_message(name, file, offline, clip_folder):
    node = composed(name)[name]
    part = next(key for key in ("features", "network", "head") if key in node)
    node[part].weights = file
    with pytest.raises(InstantiationException) as caught:
        instantiate(node, **({"clip": load_clip(str(clip_folder))} if "clip" in node else {}))
    message = str(caught.value.__cause__)
    assert isinstance(caught.value.__cause__, UserError)
    assert ("are null" if file is None else "does not exist") in message
    assert all(words in message for words in ("Download", *WITH_FILES[name]))


FROM_THE_HUB = ["clipsim_vit_b32", "clip_temp_vit_b32", "clip_score", "clip_iqa", "pick_score", "fvd_videomae"]


@pytest.mark.parametrize("name", FROM_THE_HUB)
def test_a_model_that_is_not_in_the_cache_is_one_message(name, offline, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    node = composed(name)[name]
    part = node["clip"] if "clip" in node else node["features"]
    with pytest.raises(InstantiationException) as caught:
        instantiate(node)
    message = str(caught.value.__cause__)
    assert isinstance(caught.value.__cause__, UserError)
    assert part.get("processor", part.model) in message and "--local-dir" in message
    assert "shipped:clip" in message if "clip" in node else "metric=fvd" in message


def test_sets_hold_what_suits_them():
    image, video, image_real, video_real, image_to_video, edit, sound = (set(composed(name)) for name in SETS)
    assert sound == {"log_mel", "sound_snr"} and not sound & (video | video_real | image_to_video)
    assert edit - image == {"clip_given", "edit_direction"} and image < edit
    assert image_to_video - video == {"first_frame_psnr", "first_frame_ssim", "clip_given"} and video < image_to_video
    assert not image & set(WITH_FILES) and not video & set(WITH_FILES)
    assert image - video == {"fid", "fid_data"}
    motion = {"flow_score", "motion_magnitude", "flicker", "warping_error"}
    assert video - image == {"fvd", "fvd_data", "clip_temp"} | motion
    assert image_real | video_real | image | image_to_video | edit | sound == {
        n for n in NAMES if not n.endswith(("_inception_data", "_i3d_data", "_videomae_data"))
    }
    assert motion <= video_real and not motion & image_real
    for name in SETS:
        labels = [node["name"] for node in composed(name).values()]
        assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("name", ["image_real", "video_real"])
def test_real_sets_look_into_one_folder(name, monkeypatch):
    for folder in ("weights", "/some/where"):
        if folder != "weights":
            monkeypatch.setenv("VIDITQ_WEIGHTS", folder)
        nodes = composed(name)
        parts = [node[key] for node in nodes.values() for key in ("features", "network", "head") if key in node]
        files = [part.weights for part in parts if "weights" in part]
        assert len(files) >= 4 and all(file.startswith(f"{folder}/") for file in files)
        assert len(files) == len([n for n in WITH_FILES if n in nodes])
