"""What is known of the step that a denoiser is in: noise level, bucket, and which rows of its inputs stand for all.

Legend: L leading axis of a Linear's input, N tokens, C in_features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from viditq.errors import UserError, close_names
from viditq.quant.calibration.context import StepContext, TimestepScaleLike, denoisers_of
from viditq.quant.calibration.noise_level import bucket_edges, interval_of
from viditq.quant.calibration.row_sample import Candidates, row_keys, stratified


class StepRows:
    """bucket, noise_level: None outside a forward. sample_seeds: one whole number per prompt of the coming batch."""

    def __init__(
        self, denoiser: nn.Module, timestep_scale: TimestepScaleLike, num_buckets: int, rows_per_bucket: int
    ) -> None:
        self._denoiser, self._rows_per_bucket = denoiser, rows_per_bucket
        self._context = StepContext((0, 1), timestep_scale)
        self._context.check(denoiser)
        self._edges = bucket_edges(num_buckets)
        self._num_elements = 0
        self._candidates: dict[tuple[int, int], Candidates] = {}
        self.sample_seeds: list[int] = []
        self.bucket: int | None = None

    @property
    def noise_level(self) -> float:
        """Of the step that runs."""
        assert self._context.noise_level is not None
        return self._context.noise_level

    def attach(self) -> list[RemovableHandle]:
        """Follow the denoisers' steps until these are removed; hooks that were there before see the step's end too."""
        parts = denoisers_of(self._denoiser).values()
        handles = [part.register_forward_pre_hook(self._begin, with_kwargs=True) for part in parts]
        handles += [part.register_forward_hook(self._end, always_call=True) for part in parts]
        return [*handles, *self._context.attach(self._denoiser).handles]  # which learns the noise level first

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._num_elements = seeded_batch_size([*args, *kwargs.values()], self.sample_seeds)
        self._candidates = {}
        self.bucket = interval_of(self._edges, self.noise_level)

    def _end(self, *_: Any) -> None:
        self.bucket = None

    def candidates(self, x_LNC: Tensor) -> Candidates:
        """The rows of this step to choose from; shared by all Linears of the same shape."""
        shape = (x_LNC.shape[0], x_LNC.shape[1])
        if shape not in self._candidates:
            keys = row_keys(*shape, self.sample_seeds, self._num_elements, self.noise_level)
            cells = 1 if shape[0] % self._num_elements else self._num_elements
            chosen = stratified(keys.view(cells, -1), self._rows_per_bucket)
            rows, keys, moment_rows = (part.to(x_LNC.device) for part in chosen[:3])
            self._candidates[shape] = Candidates(rows, keys, moment_rows, chosen.moment_weight)
        return self._candidates[shape]


def with_tokens(x: Tensor) -> Tensor:
    """An input [L, C], [L, N, C] or [L, ..., C] as [L, N, C]."""
    return x if x.ndim == 3 else x.flatten(1, -2) if x.ndim > 3 else x.unsqueeze(1)


def rows_of(x: Tensor, indices: Tensor) -> Tensor:
    """Those of all rows of an input [..., C]."""
    return x.flatten(0, -2).index_select(0, indices)


def seeded_batch_size(arguments: Sequence[Any], seeds: Sequence[int]) -> int:
    """`batch_size`; raises UserError unless it is a multiple of the number of seeds, one for each prompt."""
    size = batch_size(arguments)
    if not seeds or size % len(seeds):
        raise UserError(
            f"a batch of {size} does not fit {len(seeds)} sample seeds; "
            "call set_sample_seeds with one seed per prompt before sampling"
        )
    return size


def batch_size(arguments: Sequence[Any]) -> int:
    """Length of the first batch among a denoiser's arguments: a tensor of more than one axis, or a list of tensors.

    Tensors of two axes come last: they may be positions, which have no batch axis (Cosmos 3's).
    """
    for value in sorted(arguments, key=_is_flat):
        batch = value.ndim > 1 if isinstance(value, Tensor) else isinstance(value, list) and len(value) > 0
        if batch and (isinstance(value, Tensor) or isinstance(value[0], Tensor)):
            return len(value)
    raise UserError("the denoiser was called without a tensor that has a batch axis; it cannot be calibrated")


def _is_flat(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim < 3


def checked_linears(denoiser: nn.Module, names: Sequence[str]) -> dict[str, nn.Linear]:
    """The Linears of these names; raises UserError where there is none."""
    linears = {name: module for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)}
    for name in names:
        if name not in linears:
            raise UserError(f"the model has no Linear {name!r}; {close_names(name, linears)}")
    return {name: linears[name] for name in names}
