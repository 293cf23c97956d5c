"""Calibration: ordinary sampling with observers on the inputs of the Linears.

Legend: L leading axis of a Linear's input, N tokens, C in_features; P prompts, E elements of the denoiser's
batch (E = branches P for guidance), F = L / E frames (or patches) of one element.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.quant.context import Attachment, StepContext, TimestepScaleLike, denoisers_of
from viditq.quant.moments import Moments, of_moments
from viditq.quant.noise_level import bucket_edges, interval_of
from viditq.quant.observers import (
    NUM_BUCKETS,
    REDUCTIONS,
    ROWS_PER_BUCKET,
    CalibrationStats,
    Observer,
    Summary,
    summary_of,
)
from viditq.quant.registry import close_names

# Of the rows of each prompt, guidance branch and step, so many go into the second moments: one in 16, 8 to 64.
MOMENT_SHARE, MOMENT_ROWS = 16, (8, 64)
RANK_BITS = 20


class Candidates(NamedTuple):
    """Rows of one input, by index into its L N rows: those the reservoir may want, with their keys; and for moments.

    moment_weight: how many rows each of the latter stands for.
    """

    rows: Tensor
    keys: Tensor
    moment_rows: Tensor
    moment_weight: float


class Reading(NamedTuple):
    """An input that was read in this step: held weakly, so that it can be freed; its first reader; what it adds."""

    tensor: weakref.ref[Tensor]
    leader: str
    summary: Summary


class Calibrator:
    """Context manager that observes the named Linears of `denoiser` while it samples.

    denoiser: one, or an nn.ModuleDict of those of one pipeline, whose layers are then named `<denoiser>.<layer>`.

    Call `set_sample_seeds` before each batch; `stats` is always up to date. Results do not depend on the
    order of the batches, nor, but for the rounding of sums, on how prompts are batched. moment_layers: those whose
    second moments are wanted too (`QuantPlan.moment_layers`).
    """

    def __init__(
        self,
        denoiser: nn.Module,
        layer_names: Sequence[str],
        timestep_scale: TimestepScaleLike = 1000.0,
        num_buckets: int = NUM_BUCKETS,
        rows_per_bucket: int = ROWS_PER_BUCKET,
        moment_layers: Sequence[str] = (),
    ) -> None:
        assert set(moment_layers) <= set(layer_names)
        self._denoiser, self._moment_layers = denoiser, frozenset(moment_layers)
        self._linears = {name: _linear(denoiser, name) for name in layer_names}
        self._context = StepContext((0, 1), timestep_scale)
        self._edges, self._rows_per_bucket = bucket_edges(num_buckets), rows_per_bucket
        self._sample_seeds: list[int] = []
        self._num_elements = 0
        self._candidates: dict[tuple[int, int], Candidates] = {}
        self._readings: dict[int, Reading] = {}  # by the id of the input
        self._attachment: Attachment | None = None
        self.stats = CalibrationStats(
            {
                name: Observer(num_buckets, linear.in_features, rows_per_bucket, linear.weight.device)
                for name, linear in self._linears.items()
            }
        )

    @property
    def max_bytes(self) -> int:
        """What the statistics can take in memory and in their file: all of it but what layers turn out to share."""
        states = [getattr(observer, field) for observer in self.stats.layers.values() for field in REDUCTIONS]
        fixed = sum(state.nbytes for state in states)
        return fixed + sum(4 * self._linears[name].in_features ** 2 for name in self._moment_layers)

    def set_sample_seeds(self, seeds: Sequence[int]) -> None:
        """One whole number per prompt of the coming batch, the same whenever that prompt is sampled."""
        self._sample_seeds = list(seeds)

    def state(self) -> dict[str, Tensor]:
        """Everything observed so far, as flat tensors for safetensors."""
        return self.stats.to_tensors()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continues from a `state()`; raises UserError when it was made with other layers or sizes."""
        mine, moments = self.stats.to_tensors(), set(of_moments(state))
        if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in state.items() if k not in moments}:
            raise UserError("the saved calibration state has other layers or sizes than this model")
        for name, observer in self.stats.layers.items():
            for field in REDUCTIONS:
                getattr(observer, field).copy_(state[f"{name}/{field}"])
        self.stats.moments = Moments.from_tensors({key: state[key].clone() for key in moments})

    def __enter__(self) -> Calibrator:
        parts = denoisers_of(self._denoiser).values()
        handles = [part.register_forward_pre_hook(self._begin_step, with_kwargs=True) for part in parts]
        for name, linear in self._linears.items():
            handles.append(linear.register_forward_pre_hook(self._observer_hook(name)))
        self._attachment = Attachment([*handles, *self._context.attach(self._denoiser).handles])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._attachment is not None
        self._attachment.remove()

    def _begin_step(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._num_elements = seeded_batch_size([*args, *kwargs.values()], self._sample_seeds)
        self._candidates, self._readings = {}, {}

    def _observer_hook(self, name: str) -> Any:
        @torch.no_grad()
        def observe(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
            noise_level = self._context.noise_level
            if noise_level is None:
                raise UserError(f"{name} was called outside its denoiser while calibrating")
            x_LNC = args[0].flatten(1, -2) if args[0].ndim > 2 else args[0].unsqueeze(1)
            bucket = interval_of(self._edges, noise_level)
            candidates = self._candidates_of(x_LNC, noise_level)
            reading = self._reading_of(args[0], x_LNC, candidates, name)
            self.stats.layers[name].update(bucket, reading.summary)
            if name in self._moment_layers:
                leads = reading.leader == name
                rows_nC = x_LNC.flatten(0, 1)[candidates.moment_rows] if leads else None
                self.stats.moments.add(name, reading.leader, rows_nC, candidates.moment_weight)

        return observe

    def _reading_of(self, x: Tensor, x_LNC: Tensor, candidates: Candidates, name: str) -> Reading:
        """Of the layer that was the first in this step to read the very tensor `x` (q, k and v read one), or a new one.

        A tensor whose candidate rows are no longer what they were was changed in place: another input.
        """
        seen = self._readings.get(id(x))
        same = seen is not None and seen.tensor() is x
        if seen is not None and same and torch.equal(seen.summary.rows, x_LNC.flatten(0, 1)[candidates.rows]):
            return seen
        summary = summary_of(x_LNC, candidates.rows, candidates.keys, name)
        self._readings[id(x)] = Reading(weakref.ref(x), name, summary)
        return self._readings[id(x)]

    def _candidates_of(self, x_LNC: Tensor, noise_level: float) -> Candidates:
        """The rows of this step to choose from; shared by all Linears of the same shape."""
        shape = (x_LNC.shape[0], x_LNC.shape[1])
        if shape not in self._candidates:
            keys = row_keys(*shape, self._sample_seeds, self._num_elements, noise_level)
            cells = 1 if shape[0] % self._num_elements else self._num_elements
            chosen = _stratified(keys.view(cells, -1), self._rows_per_bucket)
            rows, keys, moment_rows = (part.to(x_LNC.device) for part in chosen[:3])
            self._candidates[shape] = Candidates(rows, keys, moment_rows, chosen.moment_weight)
        return self._candidates[shape]


def _stratified(keys_EM: Tensor, num_rows: int) -> Candidates:
    """Candidates whose keys let every cell (a prompt in a guidance branch) give one row before any gives a second.

    keys_EM: of the M rows of each cell. A new key is the row's rank in its cell, then as many bits of its key as fit.
    """
    cells, num_cell = keys_EM.shape
    num_moment = num_moment_rows(num_cell)
    lowest, index = keys_EM.topk(min(max(num_rows, num_moment), num_cell), largest=False)
    index = index + torch.arange(cells)[:, None] * num_cell
    ranked = (torch.arange(lowest.shape[1]) << (63 - RANK_BITS)) | (lowest >> RANK_BITS)
    keys, best = ranked[:, :num_rows].flatten().topk(min(num_rows, ranked[:, :num_rows].numel()), largest=False)
    rows = index[:, :num_rows].flatten()[best]
    return Candidates(rows, keys, index[:, :num_moment].flatten(), num_cell / num_moment)


def num_moment_rows(num_rows: int) -> int:
    """How many of so many rows of a prompt in a guidance branch and step go into the second moments."""
    lowest, highest = MOMENT_ROWS
    return min(max(num_rows // MOMENT_SHARE, lowest), highest, num_rows)


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
    """Length of the first batch among a denoiser's arguments: a tensor of more than one axis, or a list of tensors."""
    for value in arguments:
        batch = value.ndim > 1 if isinstance(value, Tensor) else isinstance(value, list) and len(value) > 0
        if batch and (isinstance(value, Tensor) or isinstance(value[0], Tensor)):
            return len(value)
    raise UserError("the denoiser was called without a tensor that has a batch axis; it cannot be calibrated")


def row_keys(num_leading: int, num_tokens: int, seeds: Sequence[int], num_elements: int, noise_level: float) -> Tensor:
    """Pseudo-random order of the L N rows of one step, int64 >= 0.

    A row's key depends on its prompt's seed, the noise level and its place inside that prompt's part of the
    batch (branch-major batches, as guidance stacks them), not on its batch mates. When the leading axis is no
    multiple of the batch (packed captions), on all seeds together.
    """
    if num_leading % num_elements:
        seeds, num_elements = [hash(tuple(seeds)) & 0x7FFFFFFF], 1
        frames = num_leading
    else:
        frames = num_leading // num_elements
    element, frame = (
        torch.arange(num_leading).div(frames, rounding_mode="floor"),
        torch.arange(num_leading) % frames,
    )
    branch, prompt = element.div(len(seeds), rounding_mode="floor"), element % len(seeds)
    key_L = _mix(torch.tensor(seeds)[prompt] + (round(noise_level * 2**24) << 32))
    key_L = _mix(key_L + branch * frames + frame)
    return (_mix(key_L[:, None] + torch.arange(num_tokens)) & 0x7FFFFFFFFFFFFFFE).flatten()


def _mix(key: Tensor) -> Tensor:
    """Finaliser of splitmix64 on int64, wrapping."""
    key = key * -7046029254386353131  # 0x9E3779B97F4A7C15
    key = (key ^ ((key >> 30) & 0x3FFFFFFFF)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    key = (key ^ ((key >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685  # 0x94D049BB133111EB
    return key ^ ((key >> 31) & 0x1FFFFFFFF)


def _linear(denoiser: nn.Module, name: str) -> nn.Linear:
    modules = dict(denoiser.named_modules())
    module = modules.get(name)
    if not isinstance(module, nn.Linear):
        linears = [n for n, m in modules.items() if isinstance(m, nn.Linear)]
        raise UserError(f"the model has no Linear {name!r}; {close_names(name, linears)}")
    return module
