"""What metrics share of a batch: a network looks at each clip once, and every value is what it would be alone."""

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from viditq.metrics.flow import load_flow
from viditq.metrics.frechet import FrechetDistance
from viditq.metrics.motion import FlowScore, MotionMagnitude, WarpingError
from viditq.metrics.once import keeping_first, once
from viditq.metrics.shapes import load_judge


class Counting(nn.Module):
    """A network or flow that counts what it is asked."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def features(self, clips_BFCHW: Tensor) -> Tensor:
        self.calls += 1
        return self.inner.features(clips_BFCHW)

    def forward(self, clips_BFCHW: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(clips_BFCHW)


def values(metrics: list[Any], batches: list[Any]) -> list[float]:
    for batch in batches:
        for metric in metrics:
            metric.update(batch)
    return [float(metric.compute()["value"]) for metric in metrics]


def test_flow_and_features_are_computed_once_a_batch_for_all_metrics(
    pairs: Any, rows_of: Any, tiny_features: nn.Module
) -> None:
    whole = pairs(8, frames=3)
    batches = [rows_of(whole, [0, 1, 2, 3]), rows_of(whole, [4, 5, 6, 7])]
    flow, features = Counting(load_flow("farneback")), Counting(tiny_features)
    shared = [FlowScore(flow, "f"), MotionMagnitude(flow, "m"), WarpingError(flow, "w")]
    shared += [FrechetDistance(features, "reference", "FVD"), FrechetDistance(features, "data", "FVD to data")]
    together = values(shared, batches)
    assert flow.calls == 2 * (2 + 2)  # forwards of both sides, and backwards for one metric
    assert features.calls == 2 * 3
    alone = [FlowScore(load_flow("farneback"), "f"), FrechetDistance(tiny_features, "data", "FVD to data")]
    assert [together[0], together[4]] == [values([metric], batches)[0] for metric in alone]


def test_another_batch_is_computed_anew_even_where_its_clips_are_equal(pairs: Any) -> None:
    asked: Counter[int] = Counter()

    def count(i: int) -> Tensor:
        asked[i] += 1
        return torch.tensor(i)

    for i in range(3):
        batch = pairs(2)
        assert [int(once(batch, "key", lambda i=i: count(i))) for _ in range(2)] == [i, i]  # type: ignore[misc]
        assert int(once(batch, "other", lambda: torch.tensor(7))) == 7
    assert asked == {0: 1, 1: 1, 2: 1}


def test_what_is_kept_of_the_first_prompts_is_there_for_batches_of_equal_clips(
    pairs: Any, rows_of: Any, tiny_features: nn.Module
) -> None:
    """As noise floors are: other samples against the same clips of the float model, of the first prompts alone."""
    whole = replace(pairs(8, frames=3), index=torch.arange(8))
    batches = [rows_of(whole, [0, 1, 2, 3]), rows_of(whole, [4, 5, 6, 7])]
    floors = [
        replace(rows_of(whole, [0, 1, 2, 3]), samples=samples) for samples in (batches[1].samples, whole.data[:4])
    ]
    with keeping_first(4):
        features = Counting(tiny_features)
        found = [values([FrechetDistance(features, "data", "FVD")], some) for some in (batches, *([f] for f in floors))]
    assert features.calls == 2 * 3 + 2 * 1
    alone = [
        values([FrechetDistance(tiny_features, "data", "FVD")], some) for some in (batches, *([f] for f in floors))
    ]
    assert found == alone
    values([FrechetDistance(features, "data", "FVD")], [floors[0]])
    assert features.calls == 2 * 3 + 2 * 1 + 3, "nothing is kept afterwards"


def test_metrics_that_ask_for_the_same_get_one() -> None:
    judge, dis = load_judge("shipped:judge"), load_flow("dis")
    assert load_judge(folder="shipped:judge") is judge and load_flow(method="dis", weights=None) is dis
    assert load_flow("farneback") is not dis
