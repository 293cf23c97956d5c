"""Worst pairs first, by what was measured."""

import pytest

from viditq.errors import UserError
from viditq.report.ranking import rank_pairs

LABELS = {"flow": {"higher_is_better": None}, "l2": {"higher_is_better": False}, "psnr": {"higher_is_better": True}}
SCORES = {"flow": [1.0, 2.0, 3.0], "l2": [0.3, 0.1, 0.2], "psnr": [20.0, 30.0, 10.0]}


@pytest.mark.parametrize(
    ("measured", "metric", "indices"),
    [(["flow", "l2", "psnr"], "psnr", [2, 0, 1]), (["l2"], "l2", [0, 2, 1]), (["flow"], "flow", [1, 2, 0])],
)
def test_pairs_are_ranked_by_what_was_measured(measured: list[str], metric: str, indices: list[int]) -> None:
    columns = {name: SCORES[name] for name in measured}
    ranking = rank_pairs({"metrics": columns, "differences": {"flow": [0.0, -4.0, 1.0]}}, LABELS)
    assert (ranking.metric, ranking.indices, ranking.scores) == (metric, indices, SCORES[metric])


def test_nothing_to_rank_by() -> None:
    with pytest.raises(UserError, match="metric=\\[psnr"):
        rank_pairs({"metrics": {}}, LABELS)
    with pytest.raises(UserError, match="cannot be ranked"):
        rank_pairs({"metrics": {"flow": SCORES["flow"]}}, LABELS)
