"""Every file of conf/metric composes, alone and in its set, and builds a metric that labels itself."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig

from viditq.errors import UserError
from viditq.metrics.clip_encoder import load_clip
from viditq.metrics.streaming import StreamingMetric

CONF = Path(__file__).parents[2] / "conf"
SETS = ("image", "video")
NAMES = sorted(path.stem for path in (CONF / "metric").glob("*.yaml") if path.stem not in SETS)


def composed(name: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(f"metric/{name}").metric


@pytest.mark.parametrize("name", NAMES)
def test_builds(name, tiny_features, clip_folder, lpips_of):
    node = composed(name)[name]
    networks = {"features": tiny_features, "clip": load_clip(str(clip_folder)), "network": lpips_of("alex")}
    metric = instantiate(node, **{key: module for key, module in networks.items() if key in node})
    assert isinstance(metric, StreamingMetric) and isinstance(metric, get_class(node._target_))
    assert metric.name and isinstance(metric.unit, str) and metric.higher_is_better in (True, False, None)


def test_lpips_without_its_file_says_where_it_comes_from():
    with pytest.raises(InstantiationException) as caught:
        instantiate(composed("lpips").lpips)
    assert isinstance(caught.value.__cause__, UserError)
    assert "download.pytorch.org/models/alexnet-owt-7be5be79.pth" in str(caught.value.__cause__)


def test_sets_hold_what_suits_them():
    image, video = (set(composed(name)) for name in SETS)
    assert image | video == set(NAMES) - {"lpips"}  # which needs a file that does not come with viditq
    assert image - video == {"fid", "fid_data"}
    motion = {"flow_score", "motion_magnitude", "flicker", "warping_error"}
    assert video - image == {"fvd", "fvd_data", "clip_temp"} | motion
    labels = [node["name"] for node in composed("video").values()]
    assert len(set(labels)) == len(labels)
