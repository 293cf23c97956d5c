"""The statistics of all Linears of a denoiser, merged without regard to order, and the file that they lie in."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from viditq.errors import UserError, close_names
from viditq.files import is_whole
from viditq.mapped import mapped_tensors, release
from viditq.quant.calibration.moments import Moments, of_moments
from viditq.quant.calibration.observers import REDUCTIONS, Observer
from viditq.quant.calibration.segment_stats import SegmentStats

STATS_LAYOUT = 3  # of the file; 1 did not say where in a bucket the steps lie, 2 had q, k and v apart
SHARED = "@shared"  # no module has such a name


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
