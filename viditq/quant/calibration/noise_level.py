"""Intervals of noise level: number i of `edges` is (edges[i], edges[i + 1]]; the first also holds 0."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence


def interval_of(edges: Sequence[float], noise_level: float) -> int:
    """Index of the interval that holds `noise_level`, which lies in [edges[0], edges[-1]]."""
    assert edges[0] <= noise_level <= edges[-1]
    return max(bisect_left(edges, noise_level) - 1, 0)


def bucket_edges(num_buckets: int) -> tuple[float, ...]:
    """Edges of `num_buckets` equal buckets of [0, 1]."""
    return tuple(i / num_buckets for i in range(num_buckets + 1))


def mixed_bucket(segments: Mapping[float, int], num_buckets: int) -> int | None:
    """The first of so many buckets with steps of two segments, None if none has. segments: noise level -> its own."""
    edges, found = bucket_edges(num_buckets), dict[int, int]()
    mixed = [bucket for level, i in segments.items() if found.setdefault(bucket := interval_of(edges, level), i) != i]
    return min(mixed, default=None)
