"""What the statistics say of one Linear over the noise levels of one segment.

Legend: K buckets, C in_features, n rows.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from viditq.quant.calibration.observers import NO_KEY, Observer

EMA_DECAY = 0.95
AGGREGATES = ("ema", "max", "percentile")
EMA_STARTS = ("noise", "clean")


class SegmentStats:
    """What the buckets of one segment say about one Linear, per input channel (float32 [C])."""

    def __init__(self, observer: Observer, buckets: list[int]) -> None:
        self._observer, self._buckets = observer, buckets

    @cached_property
    def minimum(self) -> Tensor:
        """Of everything seen."""
        return self._observer.minimum[self._buckets].amin(0)

    @cached_property
    def maximum(self) -> Tensor:
        """Likewise."""
        return self._observer.maximum[self._buckets].amax(0)

    @property
    def rows(self) -> Tensor:
        """Input rows [n, C] kept from the segment, as float32."""
        observer, buckets = self._observer, self._buckets
        return observer.rows[buckets][observer.keys[buckets] != NO_KEY].float()

    @property
    def bucket_amax(self) -> Tensor:
        """Largest magnitude of each channel in each bucket with data, low noise first [K, C]."""
        minimum_KC, maximum_KC = (getattr(self._observer, f)[self._buckets] for f in ("minimum", "maximum"))
        return torch.maximum(-minimum_KC, maximum_KC)

    def rows_like(self, density: Callable[[float], float]) -> Tensor:
        """Input rows [n, C], of each bucket as many as `density` at its middle says next to the largest density.

        A bucket's rows come in the reservoir's pseudo-random order, so its first ones are a sample. At least one row
        of each bucket.
        """
        observer, num_all = self._observer, len(self._observer.count)
        weights = [density((bucket + 0.5) / num_all) for bucket in self._buckets]
        kept = []
        for bucket, weight in zip(self._buckets, weights, strict=True):
            rows = observer.rows[bucket][observer.keys[bucket] != NO_KEY]
            kept.append(rows[: max(round(len(rows) * weight / max(weights)), 1)])
        return torch.cat(kept).float()

    def amax(self, aggregate: str = "ema", percentile: float = 99.9, ema_from: str = "noise") -> Tensor:
        """Magnitude of each channel.

        ema: mean over samples in each bucket, then 0.95 old + 0.05 new from bucket to bucket, the first sets it: from
        the highest noise level down, as a sampler steps, or up from the lowest (ema_from="clean"). Steps that share a
        bucket count as one, by their mean.
        max: over everything. percentile: of |x| over the reservoir rows, 0 to 100.
        """
        if aggregate == "max":
            return torch.maximum(-self.minimum, self.maximum)
        if aggregate == "percentile":
            return self.rows.abs().quantile(percentile / 100, dim=0)
        assert aggregate == "ema"
        mean_KC = self._observer.amax_sum[self._buckets] / self._observer.count[self._buckets][:, None]
        in_turn_KC = mean_KC if ema_from == "clean" else mean_KC.flip(0)
        value_C = in_turn_KC[0]
        for mean_C in in_turn_KC[1:]:
            value_C = EMA_DECAY * value_C + (1 - EMA_DECAY) * mean_C
        return value_C.float()
