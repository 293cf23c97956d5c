"""Which candidates are generated, and how the others are filled in."""

import math

import pytest
from scipy.stats import spearmanr

from viditq.quant.search.candidates import Candidate
from viditq.quant.search.costs import completed, rank_correlation, to_measure

CELLS = [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def proxies() -> dict[Candidate, float]:
    """Ten times less per step of bits; group b a hundred times smaller than a."""
    scale = {"a": 1.0, "b": 0.01}
    return {
        Candidate(g, s, side, bits): scale[g] * (1 + s) * 10.0 ** (4 - bits) * (2 if side == "weight" else 1)
        for side in ("weight", "activation")
        for bits in (4, 5, 6)
        for g, s in CELLS
    }


def test_what_is_generated() -> None:
    proxy = proxies()
    assert to_measure(proxy, "all", 0.02) == list(proxy) and to_measure(proxy, "proxy", 0.02) == []
    anchors = to_measure(proxy, "pruned", 0.0)
    assert {c.bits for c in anchors} == {4} and len(anchors) == 8
    assert {c.group for c in to_measure(proxy, "pruned", 0.02)} == {"a"}
    by_group = to_measure(proxy, "pruned", 0.02, rivals=lambda c: c.group)  # b against b alone
    assert {c.group for c in by_group} == {"a", "b"} and {c.bits for c in by_group} == {4}
    one_width = {c: p for c, p in proxy.items() if c.side == "weight" or c.bits == 5}
    assert {c.side for c in to_measure(one_width, "pruned", 0.0, fixed=["activation"])} == {"weight"}


def test_other_widths_follow_the_proxy() -> None:
    proxy = proxies()
    measured = {c: 7.0 * proxy[c] * (3 if c.segment else 1) for c in to_measure(proxy, "pruned", 0.0)}
    costs = completed(measured, proxy)
    for c, cost in costs.items():
        assert cost == pytest.approx(7.0 * proxy[c] * (3 if c.segment else 1))


def test_what_has_no_measured_width_takes_the_mean_ratio_of_its_side() -> None:
    proxy = proxies()
    measured = {c: proxy[c] * (100 if c.segment else 1) for c in to_measure(proxy, "pruned", 0.02)}
    costs = completed(measured, proxy)
    for c in (c for c in costs if c.group == "b"):
        assert costs[c] == pytest.approx(10 * proxy[c])  # the geometric mean of 100 and 1
    assert completed({}, proxy) == pytest.approx(proxy)
    weights = {c: 5 * proxy[c] for c in measured if c.side == "weight"}
    assert completed(weights, proxy)[Candidate("a", 0, "activation", 4)] == pytest.approx(5 * 1.0)


def test_a_segment_with_enough_measured_candidates_has_its_own_ratio() -> None:
    proxy = {Candidate(g, s, "weight", 4): 1.0 for g in "abcd" for s in (0, 1)}
    measured = {c: 3.0 if c.segment else 12.0 for c in proxy if c.group != "d"}
    costs = completed(measured, proxy)
    assert [costs[Candidate("d", s, "weight", 4)] for s in (0, 1)] == pytest.approx([12.0, 3.0])


def test_more_bits_never_cost_more() -> None:
    proxy = proxies()
    measured = dict(proxy)
    measured[Candidate("a", 0, "weight", 6)] = 50.0  # noise
    costs = completed(measured, proxy)
    assert [costs[Candidate("a", 0, "weight", b)] for b in (4, 5, 6)] == [50.0, 50.0, 50.0]
    assert costs[Candidate("a", 1, "weight", 4)] == proxy[Candidate("a", 1, "weight", 4)]


def test_rank_correlation_is_spearmans() -> None:
    first, second = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6], [2.0, 7.0, 1.0, 8.0, 2.8, 1.8]
    assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert rank_correlation(first, [math.exp(v) for v in first]) == 1
    assert rank_correlation([1, 2], [1, 2]) is None and rank_correlation([1, 1, 1], [1, 2, 3]) is None
