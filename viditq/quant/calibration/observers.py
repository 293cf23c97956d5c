"""Statistics of the inputs of Linears: fixed size, bucketed by noise level, merged without regard to order.

Legend: K buckets, C in_features, L leading axis (one "sample" each), N tokens, R reservoir rows of a bucket.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from viditq.errors import UserError, close_names
from viditq.files import is_whole
from viditq.mapped import mapped_tensors, release
from viditq.quant.calibration.moments import Moments, of_moments

STATS_LAYOUT = 3  # of the file; 1 did not say where in a bucket the steps lie, 2 had q, k and v apart
SHARED = "@shared"  # no module has such a name
NUM_BUCKETS = 20
ROWS_PER_BUCKET = 16
EMA_DECAY = 0.95
CACHE_BYTES = 2**20  # of an input looked at twice in a row, on a CPU
NO_KEY = torch.iinfo(torch.int64).max  # key of a free place in the reservoir
REDUCTIONS = {
    "minimum": "min",
    "maximum": "max",
    "amax_sum": "sum",
    "count": "sum",
    "lowest_level": "min",
    "highest_level": "max",
    "rows": "lowest",
    "keys": "lowest",
}
MERGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"min": torch.minimum, "max": torch.maximum, "sum": torch.add}
AGGREGATES = ("ema", "max", "percentile")
EMA_STARTS = ("noise", "clean")


class Summary(NamedTuple):
    """What one input adds to the state of every Linear that reads it.

    minimum, maximum [C]: over everything. amax_sum [C], float32 at least: over samples, of a sample's amax over its
    tokens. num_samples: L. rows [n, C]: candidates of the reservoir; keys [n]: theirs. noise_level: of the step.
    """

    minimum: Tensor
    maximum: Tensor
    amax_sum: Tensor
    num_samples: int
    rows: Tensor
    keys: Tensor
    noise_level: float

    @property
    def finite(self) -> bool:
        """Whether there is neither NaN nor inf in the input."""
        return bool(self.amax_sum.isfinite().all())

    @property
    def nbytes(self) -> int:
        """What it takes in memory, but for the keys, which summaries share."""
        return sum(part.nbytes for part in (self.minimum, self.maximum, self.amax_sum, self.rows))


def summary_of(x_LNC: Tensor, candidates: Tensor, keys: Tensor, noise_level: float) -> Summary:
    """candidates: indices into the L N rows of an input; keys: theirs."""
    rows_nC = x_LNC.flatten(0, 1).index_select(0, candidates)
    num_samples, parts = len(x_LNC), [x_LNC]
    if x_LNC.device.type == "cpu":  # the second look at a part then finds it in the cache
        parts = [*x_LNC.split(max(CACHE_BYTES // x_LNC[0].nbytes, 1))]
    low, high, total = zip(*map(_extremes, parts), strict=True)
    if len(parts) == 1:
        return Summary(low[0], high[0], total[0], num_samples, rows_nC, keys, noise_level)
    minimum_C, maximum_C, total_C = torch.stack(low).amin(0), torch.stack(high).amax(0), torch.stack(total).sum(0)
    return Summary(minimum_C, maximum_C, total_C, num_samples, rows_nC, keys, noise_level)


def _extremes(x_LNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each channel: minimum, maximum, sum of the samples' amax."""
    low_LC, high_LC = x_LNC.amin(1), x_LNC.amax(1)
    minimum_C, maximum_C = low_LC.amin(0), high_LC.amax(0)
    magnitude_LC = torch.maximum(low_LC.neg_(), high_LC, out=high_LC)
    dtype = torch.promote_types(x_LNC.dtype, torch.float32)  # a float64 sum would copy all of them first
    return minimum_C, maximum_C, magnitude_LC.sum(0, dtype=dtype)


def blank_state(
    leading: tuple[int, ...],
    num_buckets: int,
    in_features: int,
    rows_per_bucket: int,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """State of `leading` observers that have seen nothing; dtype: of the rows."""
    buckets = (*leading, num_buckets)
    channels, rows = (*buckets, in_features), (*buckets, rows_per_bucket)
    return {
        "minimum": torch.full(channels, torch.inf, device=device),
        "maximum": torch.full(channels, -torch.inf, device=device),
        "amax_sum": torch.zeros(channels, dtype=torch.float64, device=device),
        "count": torch.zeros(buckets, dtype=torch.int64, device=device),
        "lowest_level": torch.full(buckets, torch.inf, dtype=torch.float64, device=device),
        "highest_level": torch.full(buckets, -torch.inf, dtype=torch.float64, device=device),
        "rows": torch.zeros(*rows, in_features, dtype=dtype, device=device),
        "keys": torch.full(rows, NO_KEY, device=device),
    }


class Observer:
    """State of one Linear; `ObserverBank` adds to it.

    minimum, maximum [K, C]: over everything. amax_sum [K, C] float64 and count [K]: sum over samples of a
    sample's amax over its tokens. lowest_level, highest_level [K] float64: of the steps. rows [K, R, C] with keys
    [K, R]: the input rows of the lowest keys, in a type that holds all of them to the bit.
    """

    minimum: Tensor
    maximum: Tensor
    amax_sum: Tensor
    count: Tensor
    lowest_level: Tensor
    highest_level: Tensor
    rows: Tensor
    keys: Tensor

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.hold(state)

    def hold(self, state: Mapping[str, Tensor]) -> None:
        """Takes these very tensors, one per field."""
        for field in REDUCTIONS:
            setattr(self, field, state[field])

    def reached(self, lo: float, hi: float) -> list[int]:
        """Buckets with steps in the segment (lo, hi], to which 0 belongs as well where it is the first; ascending."""
        levels = zip(self.lowest_level.tolist(), self.highest_level.tolist(), strict=True)
        return [i for i, (low, high) in enumerate(levels) if low <= hi and (high > lo or lo == high == 0)]

    def within(self, lo: float, hi: float) -> list[int]:
        """The same; raises UserError where such a bucket has steps of another segment as well."""
        buckets, num_all = self.reached(lo, hi), len(self.count)
        for i in buckets:
            low, high = float(self.lowest_level[i]), float(self.highest_level[i])
            if high > hi or (low <= lo and lo > 0):
                raise UserError(
                    f"an edge of the segment of noise levels {lo:g} to {hi:g} parts sampling steps ({low:.4g} to "
                    f"{high:.4g}) that share a bucket of the statistics; move it to {i / num_all:g} or "
                    f"{(i + 1) / num_all:g}, or calibrate with more buckets (calibration.num_buckets, now {num_all})"
                )
        return buckets

    def merged(self, other: "Observer") -> "Observer":
        """With what `other` saw (another rank, another part of the prompts)."""
        num_rows = self.keys.shape[1]
        rows = torch.cat([self.rows, other.rows], 1)
        keys = torch.cat([self.keys, other.keys], 1)
        kept = [_lowest(rows[bucket], keys[bucket], num_rows) for bucket in range(len(keys))]
        state = dict(zip(("rows", "keys"), (torch.stack(parts) for parts in zip(*kept, strict=True)), strict=True))
        for name, reduction in REDUCTIONS.items():
            if reduction in MERGES:
                state[name] = MERGES[reduction](getattr(self, name), getattr(other, name))
        return Observer(state)


def _lowest(rows: Tensor, keys: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    keys, order = keys.topk(num_rows, largest=False, sorted=True)
    return rows[order], keys


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


class CalibrationStats:
    """Observers of all Linears of a denoiser, and second moments of the inputs of those whose rounding needs them.

    layers: those that have read the same inputs may share one observer.
    """

    def __init__(self, layers: dict[str, Observer], moments: Moments | None = None) -> None:
        self.layers, self.moments = layers, moments or Moments()

    @property
    def shapes(self) -> dict[str, list[torch.Size]]:
        """Layer -> shapes of its observer's fields."""
        return {
            name: [getattr(observer, field).shape for field in REDUCTIONS] for name, observer in self.layers.items()
        }

    def segment(self, layer: str, lo: float, hi: float) -> SegmentStats:
        """Statistics of `layer` over the noise levels [lo, hi].

        Raises UserError when the layer was not observed, never in this range, or together with steps outside of it.
        """
        if layer not in self.layers:
            hint = close_names(layer, self.layers)
            raise UserError(f"the statistics lack the layer {layer} ({hint}); calibrate this model again")
        observer = self.layers[layer]
        buckets = observer.within(lo, hi)
        if not buckets:
            raise UserError(
                f"no calibration data for {layer} at noise levels {lo:g} to {hi:g}: no sampling step "
                "falls there; calibrate with more sampling steps, or use wider segments"
            )
        return SegmentStats(observer, buckets)

    def let_go(self, layer: str) -> None:
        """Give back the memory of what was read of a layer from a file."""
        release(getattr(self.layers[layer], field) for field in REDUCTIONS)
        release(self.moments.stored(layer))

    def merge(self, other: "CalibrationStats") -> None:
        """Adds the observations of `other`, made with the same layers and sizes."""
        assert self.layers.keys() == other.layers.keys()
        merged: dict[tuple[int, int], Observer] = {}  # layers that both have together stay so
        for name, mine in self.layers.items():
            theirs = other.layers[name]
            if (id(mine), id(theirs)) not in merged:
                merged[id(mine), id(theirs)] = mine.merged(theirs)
        self.layers = {name: merged[id(mine), id(other.layers[name])] for name, mine in self.layers.items()}
        self.moments.merge(other.moments)

    def to_tensors(self) -> dict[str, Tensor]:
        """Flat state on the CPU, `<layer>/<field>` -> tensor; not copied when it is there (it can be gigabytes).

        Of layers that share an observer it is stored with the first, and `@shared` says who that is.
        """
        leaders: dict[int, str] = {}
        leader_of = {layer: leaders.setdefault(id(observer), layer) for layer, observer in self.layers.items()}
        fields = {
            f"{leader}/{field}": getattr(self.layers[leader], field).detach().cpu()
            for leader in leaders.values()
            for field in REDUCTIONS
        }
        return fields | shared_tensor(leader_of) | self.moments.to_tensors()

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "CalibrationStats":
        """Inverse of `to_tensors`; holds the very tensors."""
        layers: dict[str, Observer] = {}
        for layer in _layer_names(tensors):
            layers[layer] = Observer({field: tensors[f"{layer}/{field}"] for field in REDUCTIONS})
        shared = json.loads(bytes(tensors[SHARED].tolist())) if SHARED in tensors else {}
        layers |= {layer: layers[leader] for layer, leader in shared.items()}
        return cls(layers, Moments.from_tensors(tensors))

    def save(self, path: str | Path) -> None:
        """Writes safetensors to a temporary name, then renames."""
        temporary = f"{path}.{os.getpid()}.tmp"
        try:
            save_file(self.to_tensors(), temporary)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot write the statistics to {path}: {error}; free space or choose another folder"
            ) from error
        finally:
            Path(temporary).unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> "CalibrationStats":
        """Mapped from the file, and from those of later passes beside it; read layer by layer.

        Raises UserError when one is missing or damaged.
        """
        path = Path(path)
        stats = cls.load_some(path)
        if stats.moments.missing:
            raise UserError(
                f"the statistics {path} lack the second moments of {stats.moments.missing[0]}: calibration was not "
                "finished, or one of its files was lost; run the stage calibrate again"
            )
        return stats

    @classmethod
    def load_some(cls, path: Path) -> "CalibrationStats":
        """The same while some of the second moments have yet to be summed up (`moments.missing`)."""
        tensors: dict[str, Tensor] = {}
        for file in (path, *moment_files(path)):
            try:
                tensors |= mapped_tensors(file)
            except (OSError, ValueError, KeyError) as error:
                raise UserError(
                    f"cannot read the statistics {file}: {error}; delete the file and calibrate again"
                ) from error
        try:
            return cls.from_tensors(tensors)
        except (ValueError, KeyError) as error:
            raise UserError(
                f"cannot read the statistics {path}: it lacks {error}; delete the file and calibrate again"
            ) from error


def moment_files(path: Path) -> list[Path]:
    """The whole files of second moments that passes after the first have left beside their file of statistics."""
    return [file for file in sorted(path.parent.glob(f"{path.stem}.moments-*.safetensors")) if is_whole(file)]


def _layer_names(keys: Iterable[str]) -> list[str]:
    keys = list(keys)
    others = {SHARED, *of_moments(keys)}
    return list(dict.fromkeys(key.rsplit("/", 1)[0] for key in keys if key not in others))


def shared_tensor(leader_of: Mapping[str, str]) -> dict[str, Tensor]:
    """What a file says of layers that share an observer (layer -> the first of those it shares with, or itself)."""
    followers = {layer: leader for layer, leader in leader_of.items() if layer != leader}
    return {SHARED: torch.tensor([*json.dumps(followers).encode()], dtype=torch.uint8)} if followers else {}
