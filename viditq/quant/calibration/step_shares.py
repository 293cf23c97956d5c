"""How the sampling steps of a model are spread over segments, as calibration has seen them."""

from collections.abc import Sequence
from itertools import pairwise

from viditq.quant.calibration.observers import Observer
from viditq.quant.calibration.statistics import CalibrationStats

Shares = tuple[float, ...]
"""Share of the steps in each segment; they sum to 1."""


def step_shares(stats: CalibrationStats, edges: Sequence[float]) -> dict[str, Shares]:
    """Layer -> shares of the steps that it runs in; layers that never ran are absent.

    Where several denoisers of one pipeline share the noise levels, each has the steps of its own: a segment that it
    never runs in has the share 0. Raises UserError where an edge parts steps of one bucket.
    """
    known: dict[tuple[float, ...], Shares] = {}
    found: dict[str, Shares] = {}
    for name, layer in stats.layers.items():
        if layer.count.any():
            seen = (*layer.count.tolist(), *layer.lowest_level.tolist(), *layer.highest_level.tolist())
            if seen not in known:
                known[seen] = _shares(layer, edges)
            found[name] = known[seen]
    return found


def _shares(layer: Observer, edges: Sequence[float]) -> Shares:
    steps = [int(layer.count[layer.within(lo, hi)].sum()) for lo, hi in pairwise(edges)]
    return tuple(n / sum(steps) for n in steps)
