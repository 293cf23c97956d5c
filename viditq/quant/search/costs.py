"""The table of a sensitivity search: which candidates are measured, and what the others cost.

Every number is a mean square (of the pixel error, or of the change of a metric): variances of independent errors add,
which is what a plan's cost, the sum over its choices, takes for granted; and they scale as the proxy does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence

from viditq.errors import UserError
from viditq.quant.search.candidates import Candidate

MEASURES = ("all", "pruned", "proxy")
MIN_FITTED = 3
Costs = dict[Candidate, float]


def to_measure(
    proxies: Mapping[Candidate, float],
    measure: str,
    prune: float,
    rivals: Callable[[Candidate], Hashable] = lambda candidate: "all",
    fixed: Collection[str] = (),
) -> list[Candidate]:
    """The candidates that must be generated.

    all: every one. pruned: of each (group, segment, side) the one of fewest bits, but for those of the smallest proxies
    that together make up less than the share `prune` of the sum of their side and `rivals` (what is equal for those
    that are weighed against each other), and none of the sides `fixed`, where there is a single width to choose.
    proxy: none.
    """
    if measure == "all":
        return list(proxies)
    if measure == "proxy":
        return []
    kept = []
    for side, kind in dict.fromkeys((c.side, rivals(c)) for c in proxies):
        if side in fixed:
            continue
        of_kind = [c for c in proxies if c.side == side and rivals(c) == kind]
        anchors = sorted(anchors_of(of_kind).values(), key=lambda c: proxies[c])
        total, seen = sum(proxies[c] for c in anchors), 0.0
        for candidate in anchors:
            seen += proxies[candidate]
            if seen >= prune * total:
                kept.append(candidate)
    return [c for c in proxies if c in set(kept)]


def anchors_of(candidates: Sequence[Candidate]) -> dict[tuple[str, int, str], Candidate]:
    """(group, segment, side) -> its candidate of fewest bits."""
    anchors: dict[tuple[str, int, str], Candidate] = {}
    for c in sorted(candidates, key=lambda c: -c.bits):
        anchors[c.group, c.segment, c.side] = c
    return anchors


def completed(measured: Mapping[Candidate, float], proxies: Mapping[Candidate, float]) -> Costs:
    """The cost of every candidate.

    Measured ones have their own. Another width of a measured (group, segment, side) takes the measured cost of fewest
    bits times the ratio of their proxies; what has no measured width takes its proxy times exp(mean of
    log(cost / proxy)) over the measured candidates of its side and segment, of its side where there are fewer than
    `MIN_FITTED`, of all where its side has none, or its proxy alone.
    More bits never cost more than fewer: where measuring says so, that is noise, and the larger cost counts.
    """
    anchors = anchors_of(list(measured))
    costs: Costs = {}
    for candidate, proxy in proxies.items():
        anchor = anchors.get((candidate.group, candidate.segment, candidate.side))
        if candidate in measured:
            costs[candidate] = measured[candidate]
        elif anchor is not None and proxies[anchor] > 0:
            costs[candidate] = measured[anchor] * proxy / proxies[anchor]
        else:
            costs[candidate] = proxy * _scale(candidate, measured, proxies)
    return _monotone(costs)


def _scale(candidate: Candidate, measured: Mapping[Candidate, float], proxies: Mapping[Candidate, float]) -> float:
    logs = {c: math.log(cost / proxies[c]) for c, cost in measured.items() if cost > 0 and proxies[c] > 0}
    of_side = {c: value for c, value in logs.items() if c.side == candidate.side}
    of_segment = {c: value for c, value in of_side.items() if c.segment == candidate.segment}
    for found, least in ((of_segment, MIN_FITTED), (of_side, 1), (logs, 1)):
        if len(found) >= least:
            return math.exp(sum(found.values()) / len(found))
    return 1.0


def _monotone(costs: Costs) -> Costs:
    largest: dict[tuple[str, int, str], float] = {}
    out: Costs = {}
    for c in sorted(costs, key=lambda c: -c.bits):
        cell = (c.group, c.segment, c.side)
        largest[cell] = out[c] = max(costs[c], largest.get(cell, 0.0))
    return {candidate: out[candidate] for candidate in costs}


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's, None for fewer than 3 values or no variation (ties take the order of the sequence)."""
    if len(first) != len(second):
        raise UserError("rank correlation needs two sequences of equal length")
    ranks = [_ranks(values) for values in (first, second)]
    n = len(first)
    if n < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return 1 - 6 * sum((a - b) ** 2 for a, b in zip(*ranks, strict=True)) / (n * (n * n - 1))


def _ranks(values: Sequence[float]) -> list[int]:
    ranks = [0] * len(values)
    for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        ranks[index] = rank
    return ranks
