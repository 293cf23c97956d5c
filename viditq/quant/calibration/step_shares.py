"""How the sampling steps of a model are spread over segments, as calibration has seen them."""

from collections.abc import Sequence
from itertools import pairwise

from viditq.quant.calibration.noise_level import bucket_edges
from viditq.quant.calibration.observers import CalibrationStats

Shares = tuple[float, ...]
"""Share of the steps in each segment; they sum to 1."""


def step_shares(stats: CalibrationStats, edges: Sequence[float]) -> dict[str, Shares]:
    """Layer -> shares of the steps that it runs in; layers that never ran are absent.

    Where several denoisers of one pipeline share the noise levels, each has the steps of its own: a segment that it
    never runs in has the share 0. Exact where edges are edges of buckets; a bucket that an edge cuts counts by its
    width on either side.
    """
    known: dict[tuple[int, ...], Shares] = {}
    found: dict[str, Shares] = {}
    for name, layer in stats.layers.items():
        counts = tuple(layer.count.tolist())
        if any(counts):
            found[name] = known.setdefault(counts, _shares(counts, edges))
    return found


def _shares(counts: Sequence[int], edges: Sequence[float]) -> Shares:
    buckets = [*pairwise(bucket_edges(len(counts)))]
    steps = [
        sum(n * max(0.0, min(high, b) - max(low, a)) / (b - a) for n, (a, b) in zip(counts, buckets, strict=True))
        for low, high in pairwise(edges)
    ]
    return tuple(n / sum(steps) for n in steps)
