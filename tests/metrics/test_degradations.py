"""What each motion metric must notice, in clips of moving shapes whose motion is known: by how much, which way.

docs/metrics.md shows this table as measured.
"""

from collections.abc import Callable
from math import inf

import pytest
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor
from torchmetrics import Metric

from viditq.data.moving_shapes import draw_scenes, render
from viditq.metrics.batch import EvalBatch
from viditq.metrics.flow import load_flow
from viditq.metrics.motion import FlowScore, MotionMagnitude, TemporalFlicker, WarpingError

FLOW = load_flow("farneback")
NUM_CLIPS = 40


def metrics() -> dict[str, Metric]:
    return {
        "flow_score": FlowScore(FLOW, "flow score"),
        "motion_magnitude": MotionMagnitude(FLOW, "motion magnitude"),
        "flicker": TemporalFlicker("temporal flicker"),
        "warping_error": WarpingError(FLOW, "warping error"),
    }


def moving(num_frames: int = 8) -> Tensor:
    """Clips in which a shape moves; twice the frames (less one) is the same path at half the speed."""
    scenes = [scene for scene in draw_scenes(60, torch.Generator().manual_seed(0)) if scene.motion != 4][:NUM_CLIPS]
    return render(scenes, torch.Generator().manual_seed(1), num_frames)


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
    samples, references = ((255 * x.clamp(0, 1)).round().byte() for x in (DEGRADATIONS[degradation](), moving()))
    batch, found = EvalBatch(samples, references, ["p"] * NUM_CLIPS, torch.arange(NUM_CLIPS)), metrics()
    for metric in found.values():
        metric.update(batch)
    results = {name: metric.compute() for name, metric in found.items()}
    motion = results["motion_magnitude"]["reference_value"]
    ratios = {name: float(r["value"] / r.get("reference_value", motion)) for name, r in results.items()}
    print(degradation, {name: round(ratio, 3) for name, ratio in ratios.items()})
    for name, (low, high) in TABLE[degradation].items():
        assert low - 1e-9 <= ratios[name] <= high + 1e-9, f"{name} of {degradation}: {ratios}"
    seen = {name for name, metric in found.items() if noticed(name, metric, results[name], motion)}
    assert seen == NOTICED_BY[degradation]


def test_every_degradation_is_noticed():
    assert all(NOTICED_BY[degradation] for degradation in DEGRADATIONS if degradation != "none")
    assert set.union(*NOTICED_BY.values()) == set(metrics())
