"""Observers of Linears of one width as slices of common tensors, so that many inputs are added at once.

Legend: n Linears, u inputs, m Linears that read them, K buckets, C in_features, R reservoir rows of a bucket.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from viditq.quant.calibration.observers import NO_KEY, REDUCTIONS, Observer, blank_state
from viditq.quant.calibration.summary import Summary

ADDED = [field for field in REDUCTIONS if field not in ("rows", "keys")]


def kept_as(dtype: torch.dtype) -> torch.dtype:
    """The type in which rows of inputs are kept: they are four fifths of the statistics."""
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32


class ObserverBank:
    """observers: those of the Linears `names`, by name; their states are slices of this bank's.

    dtype: of most inputs; rows are kept in it, or in a wider one where it does not hold them.
    """

    def __init__(
        self,
        names: Sequence[str],
        num_buckets: int,
        in_features: int,
        rows_per_bucket: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._places = {name: place for place, name in enumerate(names)}
        self._num_buckets = num_buckets
        self._state = blank_state((len(names),), num_buckets, in_features, rows_per_bucket, device, kept_as(dtype))
        self.observers = {name: Observer(self._slice(place)) for name, place in self._places.items()}

    def to(self, device: torch.device) -> None:
        """Moves the state of all observers."""
        self._state = {field: state.to(device) for field, state in self._state.items()}
        self._hold()

    def hold_rows_as(self, dtype: torch.dtype) -> None:
        """Keep rows in a type that also holds those of `dtype` to the bit (float64: as float32)."""
        rows = self._state["rows"]
        wide = torch.promote_types(rows.dtype, kept_as(dtype))
        if wide != rows.dtype:
            with torch.inference_mode(False):
                self._state["rows"] = rows.to(wide)
            self._hold()

    def grow(self, sources: Mapping[str, str]) -> None:
        """Adds Linears (name -> the one here whose state so far is also theirs)."""
        if not sources:
            return
        state, old = self._state, len(self._places)
        at = [self._places[source] for source in sources.values()]
        self._places |= {name: old + i for i, name in enumerate(sources)}
        with torch.inference_mode(False):  # Lightning samples in inference mode; a later state is loaded outside it
            for field, values in state.items():
                state[field] = values.new_empty(len(self._places), *values.shape[1:])
                state[field][:old] = values
                for place, source in enumerate(at, old):
                    state[field][place] = values[source]
        for name in sources:
            self.observers[name] = Observer(self._slice(self._places[name]))
        self._hold()

    def _hold(self) -> None:
        for name, place in self._places.items():
            self.observers[name].hold(self._slice(place))

    def update(self, seen: Mapping[tuple[str, int], Summary]) -> bool:
        """Adds an input of each of these (Linear, bucket); all with as many candidate rows.

        Returns False, and adds nothing, where one of them has a NaN or inf.
        """
        summaries = [*{id(summary): summary for summary in seen.values()}.values()]  # q, k and v share one
        total_uC = torch.stack([summary.amax_sum for summary in summaries]).double()
        if not math.isfinite(total_uC.sum()):
            return False
        if self._state["count"].device != total_uC.device:  # made before the model moved, or its weights are offloaded
            self.to(total_uC.device)
        for dtype in {summary.rows.dtype for summary in summaries}:
            self.hold_rows_as(dtype)
        numbers = {id(summary): number for number, summary in enumerate(summaries)}
        which = [numbers[id(summary)] for summary in seen.values()]
        places = [self._places[name] * self._num_buckets + bucket for name, bucket in seen]
        which_m, at_m = (torch.tensor(indices, device=total_uC.device) for indices in (which, places))
        state = {field: values.flatten(0, 1) for field, values in self._state.items()}  # views
        self._update_rows(state, at_m, which_m, summaries)
        low_mC, high_mC = (
            torch.stack([getattr(summary, name) for summary in summaries]).index_select(0, which_m)
            for name in ("minimum", "maximum")
        )
        counts = torch.tensor([summary.num_samples for summary in seen.values()], device=total_uC.device)
        levels = [summary.noise_level for summary in seen.values()]
        level_m = torch.tensor(levels, dtype=torch.float64, device=total_uC.device)
        old = {name: values.index_select(0, at_m) for name, values in state.items() if name in ADDED}
        new = {
            "minimum": torch.minimum(old["minimum"], low_mC),
            "maximum": torch.maximum(old["maximum"], high_mC),
            "amax_sum": old["amax_sum"] + total_uC.index_select(0, which_m),
            "count": old["count"] + counts,
            "lowest_level": torch.minimum(old["lowest_level"], level_m),
            "highest_level": torch.maximum(old["highest_level"], level_m),
        }
        for name, values in new.items():
            state[name].index_copy_(0, at_m, values.to(state[name].dtype))
        return True

    @staticmethod
    def _update_rows(state: Mapping[str, Tensor], at_m: Tensor, which_m: Tensor, summaries: Sequence[Summary]) -> None:
        """Moves within the reservoirs `at_m` what stays, then copies what comes; nothing else is touched."""
        rows_RC = state["rows"].flatten(0, 1)
        keys_mr = torch.stack([summary.keys for summary in summaries]).index_select(0, which_m)
        num_rows, num_new = state["keys"].shape[1], keys_mr.shape[1]
        keys, source = torch.cat([state["keys"].index_select(0, at_m), keys_mr], 1).topk(num_rows, largest=False)
        state["keys"].index_copy_(0, at_m, keys)
        slots = torch.arange(num_rows, device=source.device)
        used = keys != NO_KEY
        m, slot = (used & (source < num_rows) & (source != slots)).nonzero(as_tuple=True)
        moved = rows_RC.index_select(0, at_m[m] * num_rows + source[m, slot])
        rows_RC.index_copy_(0, at_m[m] * num_rows + slot, moved)
        m, slot = (used & (source >= num_rows)).nonzero(as_tuple=True)
        come = torch.cat([summary.rows for summary in summaries])
        come = come.index_select(0, which_m[m] * num_new + source[m, slot] - num_rows)
        rows_RC.index_copy_(0, at_m[m] * num_rows + slot, come.to(rows_RC.dtype))

    def _slice(self, place: int) -> dict[str, Tensor]:
        return {field: self._state[field][place] for field in REDUCTIONS}
