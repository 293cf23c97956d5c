"""What several metrics need of one batch, computed for the first that asks: networks and optical flow cost most."""

import functools
import inspect
import weakref
from collections.abc import Callable, Hashable
from typing import ParamSpec, TypeVar

from torch import Tensor, nn

from viditq.metrics.batch import EvalBatch

P = ParamSpec("P")
Network = TypeVar("Network", bound=nn.Module)

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


def one_for_all(load: Callable[P, Network]) -> Callable[P, Network]:
    """`load`, which gives the same frozen network to all who ask with equal arguments while one of them holds it."""
    kept: weakref.WeakValueDictionary[tuple[Hashable, ...], Network] = weakref.WeakValueDictionary()
    signature = inspect.signature(load)

    @functools.wraps(load)
    def shared(*args: P.args, **kwargs: P.kwargs) -> Network:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        key = tuple(bound.arguments.values())
        network = kept.get(key)
        if network is None:
            network = kept[key] = load(*args, **kwargs)
        return network

    return shared
