"""Second moments under a budget of bytes: several passes over the same prompts, each summing up a range of layers.

The first pass observes all layers, learns who shares an input, and sums up the first layers; each later one sums up
those that come next. What each adds is the same as in one pass, in the same order, so the results are equal to the bit.

Legend: C in_features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.quant.calibration.context import Attachment, TimestepScaleLike
from viditq.quant.calibration.moments import Moments, matrix_bytes
from viditq.quant.calibration.observers import NUM_BUCKETS, ROWS_PER_BUCKET
from viditq.quant.calibration.step_rows import StepRows, checked_linears, rows_of, with_tokens


def end_of_range(widths: Sequence[int], start: int, budget: int) -> int:
    """Where the range of layers ends that begins at `start`: their matrices fit `budget` bytes, or it is one layer.

    widths: in_features of each layer.
    """
    end, total = start, 0
    while end < len(widths) and (end == start or total + matrix_bytes(widths[end]) <= budget):
        total += matrix_bytes(widths[end])
        end += 1
    return end


def ranges(layers: Mapping[str, int], leader_of: Mapping[str, str], budget: int) -> list[list[str]]:
    """The layers whose sums each pass takes; the first is planned before it is known who shares an input.

    layers: name -> in_features, in model order. leader_of: layer -> the one that has its sums, itself where absent.
    """
    names = [*layers]
    first = names[: end_of_range([*layers.values()], 0, budget)]
    later = [name for name in names[len(first) :] if leader_of.get(name, name) == name]
    return [first, *cut(later, layers, budget)]


def cut(names: Sequence[str], layers: Mapping[str, int], budget: int) -> list[list[str]]:
    """`names` in ranges, each as of `end_of_range`; layers: name -> in_features."""
    found, start, widths = [], 0, [layers[name] for name in names]
    while start < len(names):
        end = end_of_range(widths, start, budget)
        found.append([*names[start:end]])
        start = end
    return found


def most_bytes(passes: Sequence[Sequence[str]], layers: Mapping[str, int]) -> int:
    """What the sums of the largest pass take at most."""
    return max(sum(matrix_bytes(layers[name]) for name in names) for names in passes)


class MomentPass:
    """Context manager like a `Calibrator` that takes the sums of `leaders` alone: layers that lead an input.

    rows_per_bucket: that of the first pass, as it has a say in which rows are taken.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        leaders: Sequence[str],
        timestep_scale: TimestepScaleLike = 1000.0,
        rows_per_bucket: int = ROWS_PER_BUCKET,
    ) -> None:
        self._linears = checked_linears(denoiser, leaders)
        self._step = StepRows(denoiser, timestep_scale, NUM_BUCKETS, rows_per_bucket)
        self._attachment: Attachment | None = None
        self.moments = Moments()

    @property
    def max_bytes(self) -> int:
        """What the sums take."""
        return sum(matrix_bytes(linear.in_features) for linear in self._linears.values())

    def set_sample_seeds(self, seeds: Sequence[int]) -> None:
        """Those of the coming batch."""
        self._step.sample_seeds = list(seeds)

    def state(self) -> dict[str, Tensor]:
        """The sums so far, as flat tensors for safetensors."""
        return self.moments.to_tensors()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continues from a `state()`; raises UserError when it is of other layers or sizes."""
        loaded = Moments.from_tensors({key: value.clone() for key, value in state.items()})
        widths = {name: linear.in_features for name, linear in self._linears.items()}
        if any(widths.get(name) != len(total) for name, total in loaded.sums.items()):
            raise UserError("the saved second moments are of other layers or sizes than this pass")
        self.moments = loaded

    def __enter__(self) -> MomentPass:
        handles = [linear.register_forward_pre_hook(self._hook(name)) for name, linear in self._linears.items()]
        self._attachment = Attachment([*handles, *self._step.attach()])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._attachment is not None
        self._attachment.remove()

    def _hook(self, name: str) -> Any:
        @torch.no_grad()
        def add(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not args[0].numel():
                return  # as in Calibrator
            candidates = self._step.candidates(with_tokens(args[0]))
            self.moments.add(name, name, rows_of(args[0], candidates.moment_rows), candidates.moment_weight)

        return add
