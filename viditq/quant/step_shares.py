"""How the sampling steps of a model are spread over segments, as calibration has seen them."""

from collections.abc import Sequence
from itertools import pairwise

from viditq.quant.noise_level import bucket_edges
from viditq.quant.observers import CalibrationStats


def step_shares(stats: CalibrationStats, edges: Sequence[float]) -> tuple[float, ...]:
    """Share of the sampling steps in each segment; they sum to 1.

    Exact where edges are edges of buckets; a bucket that an edge cuts counts by its width on either side.
    """
    counts = next(iter(stats.layers.values())).count.tolist()
    buckets = [*pairwise(bucket_edges(len(counts)))]
    steps = [
        sum(n * max(0.0, min(high, b) - max(low, a)) / (b - a) for n, (a, b) in zip(counts, buckets, strict=True))
        for low, high in pairwise(edges)
    ]
    return tuple(n / sum(steps) for n in steps)
