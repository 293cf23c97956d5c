"""What metrics must notice, in clips of moving shapes whose motion is known: by how much, and which way.

docs/metrics.md shows the values of all metrics: `PYTHONPATH=. python tests/metrics/test_degradations.py` prints them.
"""

from collections.abc import Callable
from math import inf
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from scipy.ndimage import gaussian_filter1d
from torch import Tensor
from torchmetrics import Metric

from viditq.data.moving_shapes import Scene, draw_scenes, render
from viditq.metrics.batch import EvalBatch

NUM_CLIPS = 40
MOTION = ("flow_score", "motion_magnitude", "flicker", "warping_error")


def build(*names: str) -> dict[str, Metric]:
    """Metrics of video models as configured, or those that are named."""
    with initialize_config_dir(str(Path(__file__).parents[2] / "conf"), version_base="1.3"):
        nodes = compose("metric/video").metric
    return {name: instantiate(nodes[name]) for name in names or nodes}


def results_of(metrics: dict[str, Metric], degradation: str) -> dict[str, dict[str, Tensor]]:
    """What metrics compute of degraded clips beside the clips themselves; other clips of the same scenes as data."""
    clips = [(255 * x.clamp(0, 1)).round().byte() for x in (DEGRADATIONS[degradation](), moving(), moving(seed=5))]
    prompts = [scene.caption(video=True) for scene in moving_scenes()]
    batch, results = EvalBatch(clips[0], clips[1], prompts, torch.arange(NUM_CLIPS), clips[2]), {}
    for name, metric in metrics.items():
        metric.reset()
        metric.update(batch)
        results[name] = metric.compute()
    return results


def moving_scenes() -> list[Scene]:
    return [scene for scene in draw_scenes(60, torch.Generator().manual_seed(0)) if scene.motion != 4][:NUM_CLIPS]


def moving(num_frames: int = 8, seed: int = 1) -> Tensor:
    """Clips in which a shape moves; twice the frames (less one) is the same path at half the speed."""
    return render(moving_scenes(), torch.Generator().manual_seed(seed), num_frames)


def blurred(clips: Tensor) -> Tensor:
    values = clips.numpy()
    for axis in (3, 4):
        values = gaussian_filter1d(values, 2.0, axis=axis, mode="nearest")
    return torch.from_numpy(values)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


DEGRADATIONS: dict[str, Callable[[], Tensor]] = {
    "none": moving,
    "frozen": lambda: moving()[:, :1].expand(-1, 8, -1, -1, -1),
    "half speed": lambda: moving(15)[:, :8],
    "shuffled": lambda: moving()[:, [0, 3, 1, 5, 2, 7, 4, 6]],
    "reversed": lambda: moving().flip(1),
    "blur": lambda: blurred(moving()),
    "pumping": lambda: moving() + 0.06 * noise(NUM_CLIPS, 8, 1, 1, 1),
    "pixel noise": lambda: moving() + 0.03 * noise(NUM_CLIPS, 8, 3, 32, 32),
}
# Each value over what the clips have without degradation; flow_score over their motion magnitude.
SAME = (0.95, 1.05)
TABLE: dict[str, dict[str, tuple[float, float]]] = {
    "none": dict.fromkeys(("motion_magnitude", "flicker", "warping_error"), (1, 1)) | {"flow_score": (0, 0)},
    "frozen": {
        "flow_score": (0.95, 1.05),
        "motion_magnitude": (0, 0.01),
        "flicker": (0, 0),
        "warping_error": (0, 0.05),  # wrongly better: the reason not to read it alone
    },
    "half speed": {
        "flow_score": (0.45, 0.75),
        "motion_magnitude": (0.45, 0.55),
        "flicker": (0.45, 0.55),
        "warping_error": (0.4, 0.7),  # wrongly better
    },
    "shuffled": {
        "flow_score": (2, inf),
        "motion_magnitude": (2, inf),
        "flicker": (2, inf),
        "warping_error": (8, inf),
    },
    "reversed": {"flow_score": (1.7, 2.3), "motion_magnitude": SAME, "flicker": (1, 1), "warping_error": SAME},
    "blur": {
        "flow_score": (0.05, 0.2),
        "motion_magnitude": (0.9, 1),
        "flicker": (0.8, 0.92),
        "warping_error": (0.7, 1.1),
    },
    "pumping": {
        "flow_score": (0, 0.05),
        "motion_magnitude": SAME,
        "flicker": (2.5, inf),
        "warping_error": (30, inf),
    },
    "pixel noise": {
        "flow_score": (0.05, 0.2),
        "motion_magnitude": (1, 1.1),
        "flicker": (2, inf),
        "warping_error": (15, inf),
    },
}
NOTICED_BY: dict[str, set[str]] = {
    "none": set(),
    "frozen": {"flow_score", "motion_magnitude", "flicker"},
    "half speed": {"flow_score", "motion_magnitude", "flicker"},
    "shuffled": {"flow_score", "motion_magnitude", "flicker", "warping_error"},
    "reversed": {"flow_score"},
    "blur": {"flow_score", "flicker"},
    "pumping": {"flicker", "warping_error"},
    "pixel noise": {"flow_score", "flicker", "warping_error"},
}


def noticed(name: str, metric: Metric, result: dict[str, Tensor], motion: Tensor) -> bool:
    """Is the sample off by more than 5 % of the float model's value, and by 5 standard errors, the bad way?"""
    if name == "flow_score":
        return bool(result["value"] > 0.05 * motion)
    difference = result["per_sample"] - result["per_sample_reference"]
    harm = difference.mean().abs() if metric.higher_is_better is None else difference.mean()
    return bool(harm > 0.05 * result["reference_value"] and harm > 5 * difference.std() / NUM_CLIPS**0.5)


@pytest.mark.parametrize("degradation", DEGRADATIONS)
def test_degradations_move_each_metric_as_stated(degradation):
    metrics = build(*MOTION)
    results = results_of(metrics, degradation)
    motion = results["motion_magnitude"]["reference_value"]
    ratios = {name: float(r["value"] / r.get("reference_value", motion)) for name, r in results.items()}
    for name, (low, high) in TABLE[degradation].items():
        assert low - 1e-9 <= ratios[name] <= high + 1e-9, f"{name} of {degradation}: {ratios}"
    seen = {name for name, metric in metrics.items() if noticed(name, metric, results[name], motion)}
    assert seen == NOTICED_BY[degradation]


def test_every_degradation_is_noticed():
    assert all(NOTICED_BY[degradation] for degradation in DEGRADATIONS if degradation != "none")
    assert set.union(*NOTICED_BY.values()) == set(MOTION)


def test_what_clip_does_not_notice():
    """Why the motion metrics are there: a frozen clip looks best to CLIP-temp, a reversed one the same to both."""
    metrics = build("clipsim", "clip_temp")
    frozen, backwards = results_of(metrics, "frozen"), results_of(metrics, "reversed")
    assert frozen["clip_temp"]["value"] > frozen["clip_temp"]["reference_value"] + 2
    for name in metrics:
        assert backwards[name]["value"] == pytest.approx(backwards[name]["reference_value"].item(), abs=0.01)


def print_table() -> None:
    metrics = build()
    print(f"| | {' | '.join(metrics)} |")
    print("|---" * (len(metrics) + 1) + "|")
    for degradation in DEGRADATIONS:
        results = results_of(metrics, degradation)
        print(f"| {degradation} | {' | '.join(format(r['value'].item(), '.4g') for r in results.values())} |")


if __name__ == "__main__":
    print_table()
