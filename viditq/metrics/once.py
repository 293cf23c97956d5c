"""What several metrics need of one batch, computed for the first that asks: networks and optical flow cost most."""

import weakref
from collections.abc import Callable, Hashable

from torch import Tensor

from viditq.metrics.batch import EvalBatch

_found: dict[Hashable, Tensor] = {}  # of the last batch, and gone with it
_batch: weakref.ref[EvalBatch] | None = None


def once(batch: EvalBatch, key: Hashable, work: Callable[[], Tensor]) -> Tensor:
    """What `work` returns, which nobody may write to; of calls with one batch and equal keys the first one's.

    key: names the clips and all that the result depends on; modules are equal only to themselves.
    """
    global _batch
    if _batch is None or _batch() is not batch:
        _found.clear()
        _batch = weakref.ref(batch, lambda _: _found.clear())
    if key not in _found:
        _found[key] = work()
    return _found[key]
