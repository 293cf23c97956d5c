"""Observers of Linears of one width as slices of common tensors, so that a step of the sampler is added to all at once.

Legend: n Linears, m of them, K buckets, C in_features, R reservoir rows of a bucket.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from viditq.quant.observers import REDUCTIONS, Observer, Summary, blank_state

LARGE = 2**14  # numbers in the minimum of a summary: from here on copying costs more than one call each


class ObserverBank:
    """observers: those of the Linears `names`, by name; their states are slices of this bank's."""

    def __init__(
        self,
        names: Sequence[str],
        num_buckets: int,
        in_features: int,
        rows_per_bucket: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._places = {name: place for place, name in enumerate(names)}
        self._state = blank_state((len(names),), num_buckets, in_features, rows_per_bucket, device)
        self.observers = {name: Observer(self._slice(place)) for name, place in self._places.items()}

    def to(self, device: torch.device) -> None:
        """Moves the state of all observers."""
        self._state = {field: state.to(device) for field, state in self._state.items()}
        for name, place in self._places.items():
            self.observers[name].hold(self._slice(place))

    def update(self, bucket: int, seen: Mapping[str, Summary]) -> bool:
        """Adds one input of each of these Linears; all of one shape and dtype, and with the same candidate rows.

        Returns False, and adds nothing, where one of them has a NaN or inf.
        """
        summaries = [*{id(summary): summary for summary in seen.values()}.values()]  # q, k and v share one
        numbers = {id(summary): number for number, summary in enumerate(summaries)}
        which = torch.tensor([numbers[id(summary)] for summary in seen.values()], device=summaries[0].rows.device)
        rows_mrC = torch.stack([summary.rows for summary in summaries]).index_select(0, which)
        low_mC, high_mC, total_mC = (part.index_select(0, which) for part in reduced(summaries))
        if not math.isfinite(total_mC.sum()):
            return False
        if self._state["count"].device != low_mC.device:  # made before the model moved, or its weights are offloaded
            self.to(low_mC.device)
        at = torch.tensor([self._places[name] for name in seen], device=low_mC.device)
        state = {field: values[:, bucket] for field, values in self._state.items()}
        old = {field: values.index_select(0, at) for field, values in state.items()}
        keys_mr = summaries[0].keys.expand(len(at), -1)
        keys, order = torch.cat([old["keys"], keys_mr], 1).topk(old["keys"].shape[1], largest=False)
        rows_mRC = torch.cat([old["rows"], rows_mrC.to(old["rows"].dtype)], 1)
        order += torch.arange(len(at), device=at.device)[:, None] * rows_mRC.shape[1]
        new = {
            "minimum": torch.minimum(old["minimum"], low_mC),
            "maximum": torch.maximum(old["maximum"], high_mC),
            "amax_sum": old["amax_sum"] + total_mC,
            "count": old["count"] + len(summaries[0].minimum),
            "rows": rows_mRC.flatten(0, 1).index_select(0, order.flatten()).view_as(old["rows"]),
            "keys": keys,
        }
        for field, values in new.items():
            state[field].index_copy_(0, at, values)
        return True

    def _slice(self, place: int) -> dict[str, Tensor]:
        return {field: self._state[field][place] for field in REDUCTIONS}


def reduced(summaries: Sequence[Summary]) -> tuple[Tensor, Tensor, Tensor]:
    """Of each: minimum and maximum [m, C], and the sum over its samples of their largest magnitude, float64 [m, C].

    Small ones are taken together, large ones one by one, which copies nothing.
    """
    if len(summaries) > 1 and summaries[0].minimum.numel() > LARGE:
        low, high, total = (torch.cat(parts) for parts in zip(*(reduced([s]) for s in summaries), strict=True))
        return low, high, total
    one = summaries[0]
    if len(summaries) == 1:
        low_mLC, high_mLC = one.minimum[None], one.maximum[None]
    else:
        low_mLC, high_mLC = (torch.stack([getattr(s, name) for s in summaries]) for name in ("minimum", "maximum"))
    total_mC = torch.maximum(-low_mLC, high_mLC).sum(1, dtype=torch.float64)
    return low_mLC.amin(1), high_mLC.amax(1), total_mC
