"""Which pairs come first in pictures and tables: the worst ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from viditq.errors import UserError


@dataclass(frozen=True)
class Ranking:
    """Prompt indices, worst first, by the per-prompt `scores` of `metric`."""

    metric: str
    indices: list[int]
    scores: list[float]


def rank_pairs(per_prompt: Mapping[str, Any], labels: Mapping[str, Any]) -> Ranking:
    """Rank the pairs of per_prompt.json by PSNR if it was measured, else by the first metric with a value per prompt.

    A metric without a better direction ranks by how far the pair differs. Raises UserError if no metric can rank.
    """
    scores, differences = per_prompt["metrics"], per_prompt.get("differences", {})
    for name in (name for name in ["psnr", *labels] if name in scores):
        better = labels[name]["higher_is_better"]
        badness = [-value if better else value for value in scores[name]]
        if better is None:
            if name not in differences:
                continue
            badness = [abs(value) for value in differences[name]]
        return Ranking(name, sorted(range(len(badness)), key=lambda i: -badness[i]), scores[name])
    raise UserError("No metric has a value per prompt, so pairs cannot be ranked. Add psnr: metric=[psnr,...].")
