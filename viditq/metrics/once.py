"""What several metrics need of one batch, computed for the first that asks: networks and optical flow cost most."""

import functools
import hashlib
import inspect
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from torch import Tensor, nn

from viditq.metrics.batch import EvalBatch

P = ParamSpec("P")
Network = TypeVar("Network", bound=nn.Module)

_found: dict[Hashable, Tensor] = {}  # of the last batch, and gone with it
_batch: weakref.ref[EvalBatch] | None = None
_kept: dict[Hashable, Tensor] | None = None  # of batches gone by, within `keeping_first`
_kept_prompts = 0


def once(batch: EvalBatch, key: Hashable, work: Callable[[], Tensor], clips: Tensor | None = None) -> Tensor:
    """What `work` returns, which nobody may write to; of calls with one batch and equal keys the first one's.

    key: names the clips and all that the result depends on; modules are equal only to themselves. clips: where the
    result is small and depends on these alone, so that it is worth keeping (`keeping_first`).
    """
    global _batch
    if _batch is None or _batch() is not batch:
        _found.clear()
        _batch = weakref.ref(batch, lambda _: _found.clear())
    if key not in _found:
        _found[key] = work() if clips is None else _of_equal_clips(batch, key, work, clips)
    return _found[key]


@contextmanager
def keeping_first(prompts: int) -> Iterator[None]:
    """Within, small results of batches of the first so many prompts are there again for batches of equal clips.

    The noise floors are set against the same clips of the float model one after the other.
    """
    global _kept, _kept_prompts
    _kept, _kept_prompts = {}, prompts
    try:
        yield
    finally:
        _kept = None


def _of_equal_clips(batch: EvalBatch, key: Hashable, work: Callable[[], Tensor], clips: Tensor) -> Tensor:
    if _kept is None or int(batch.index.max()) >= _kept_prompts:
        return work()
    digest = hashlib.sha256(clips.cpu().contiguous().numpy()).digest()  # type: ignore[arg-type]
    if (key, clips.shape, digest) not in _kept:
        _kept[key, clips.shape, digest] = work()
    return _kept[key, clips.shape, digest]


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
