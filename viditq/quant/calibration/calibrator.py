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

from viditq.errors import UserError, close_names
from viditq.quant.calibration.context import Attachment, StepContext, TimestepScaleLike, denoisers_of
from viditq.quant.calibration.moments import Moments, of_moments
from viditq.quant.calibration.noise_level import bucket_edges, interval_of
from viditq.quant.calibration.observer_bank import ObserverBank
from viditq.quant.calibration.observers import (
    NUM_BUCKETS,
    REDUCTIONS,
    ROWS_PER_BUCKET,
    CalibrationStats,
    Summary,
    summary_of,
)
from viditq.quant.calibration.row_sample import Candidates, row_keys, stratified

PENDING_BYTES = 2**22  # that what inputs have shown may take before it is added to the statistics


class Like(NamedTuple):
    """What inputs added at once have in common: bank of their observers, number of candidate rows, device."""

    bank: int
    num_rows: int
    device: torch.device


class Reading(NamedTuple):
    """An input that was read in this step: held weakly, so that it can be freed; its first reader; what it adds."""

    tensor: weakref.ref[Tensor]
    leader: str
    candidates: Candidates
    summary: Summary

    def still(self, x: Tensor) -> bool:
        """Whether `x` is this input (q, k and v read one); one whose candidate rows were changed in place is not."""
        return self.tensor() is x and torch.equal(self.summary.rows, rows_of(x, self.candidates.rows))


def rows_of(x: Tensor, indices: Tensor) -> Tensor:
    """Those of all rows of an input [..., C]."""
    return x.flatten(0, -2).index_select(0, indices)


class Calibrator:
    """Context manager that observes the named Linears of `denoiser` while it samples.

    denoiser: one, or an nn.ModuleDict of those of one pipeline, whose layers are then named `<denoiser>.<layer>`.

    Call `set_sample_seeds` before each batch. Results do not depend on the order of the batches, nor, but for the
    rounding of sums, on how prompts are batched. moment_layers: those whose second moments are wanted too
    (`QuantPlan.moment_layers`). Raises UserError for NaN or inf, a few steps late where a model is small.
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
        self._context.check(denoiser)
        self._edges, self._rows_per_bucket = bucket_edges(num_buckets), rows_per_bucket
        self._sample_seeds: list[int] = []
        self._num_elements = 0
        self._candidates: dict[tuple[int, int], Candidates] = {}
        self._readings: dict[int, Reading] = {}  # by the id of the input
        self._attachment: Attachment | None = None
        widths: dict[tuple[int, torch.device], list[str]] = {}
        for name, linear in self._linears.items():
            widths.setdefault((linear.in_features, linear.weight.device), []).append(name)
        sizes = [(of, num_buckets, width, rows_per_bucket, device) for (width, device), of in widths.items()]
        self._banks = [ObserverBank(*size) for size in sizes]
        self._bank_of = {name: i for i, bank in enumerate(self._banks) for name in bank.observers}
        self._bucket: int | None = None  # of the step that runs
        self._forget_pending()
        self._stats = CalibrationStats({n: self._banks[self._bank_of[n]].observers[n] for n in self._linears})

    @property
    def stats(self) -> CalibrationStats:
        """Statistics of everything observed so far."""
        self._flush()
        return self._stats

    @property
    def max_bytes(self) -> int:
        """What the statistics can take in memory and in their file: all of it but what layers turn out to share."""
        states = [getattr(observer, field) for observer in self._stats.layers.values() for field in REDUCTIONS]
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
        handles += [part.register_forward_hook(self._end_step, always_call=True) for part in parts]
        for name, linear in self._linears.items():
            handles.append(linear.register_forward_pre_hook(self._observer_hook(name)))
        self._attachment = Attachment([*handles, *self._context.attach(self._denoiser).handles])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._attachment is not None
        self._attachment.remove()
        if error is None:
            self._flush()
        self._forget_pending()

    def _begin_step(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._num_elements = seeded_batch_size([*args, *kwargs.values()], self._sample_seeds)
        self._candidates, self._readings = {}, {}
        assert self._context.noise_level is not None  # its hook comes first
        self._bucket = interval_of(self._edges, self._context.noise_level)

    def _end_step(self, *_: Any) -> None:
        self._bucket = None

    def _observer_hook(self, name: str) -> Any:
        def observe(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self._bucket is None:
                raise UserError(f"{name} was called outside its denoiser while calibrating")
            x = args[0]
            reading = self._readings.get(id(x))
            if reading is None or not reading.still(x):
                reading = self._readings[id(x)] = self._read(x, name)
            self._add(name, self._bucket, reading.summary)
            if name in self._moment_layers:
                self._add_moments(name, x, reading)

        return observe

    def _add(self, name: str, bucket: int, summary: Summary) -> None:
        like = Like(self._bank_of[name], len(summary.rows), summary.rows.device)
        if (name, bucket) in self._pending.get(like, ()):  # called again at this noise level
            self._flush()
        self._pending.setdefault(like, {})[name, bucket] = summary
        self._readers.append((name, summary))
        self._pending_bytes += summary.nbytes
        if self._pending_bytes > PENDING_BYTES:
            self._flush()

    @torch.no_grad()
    def _add_moments(self, name: str, x: Tensor, reading: Reading) -> None:
        rows_nC = rows_of(x, reading.candidates.moment_rows) if reading.leader == name else None
        self._stats.moments.add(name, reading.leader, rows_nC, reading.candidates.moment_weight)

    @torch.no_grad()
    def _flush(self) -> None:
        pending, readers = self._pending, self._readers
        self._forget_pending()
        if not all([self._banks[like.bank].update(seen) for like, seen in pending.items()]):
            layer = next(name for name, summary in readers if not summary.finite)
            raise UserError(
                f"the input of {layer} contains NaN or inf; check the model in this dtype before calibrating"
            )

    def _forget_pending(self) -> None:
        self._pending: dict[Like, dict[tuple[str, int], Summary]] = {}
        self._pending_bytes = 0
        self._readers: list[tuple[str, Summary]] = []  # in the order in which they were called

    @torch.no_grad()
    def _read(self, x: Tensor, name: str) -> Reading:
        x_LNC = x if x.ndim == 3 else x.flatten(1, -2) if x.ndim > 3 else x.unsqueeze(1)
        candidates = self._candidates_of(x_LNC)
        assert self._context.noise_level is not None
        summary = summary_of(x_LNC, candidates.rows, candidates.keys, self._context.noise_level)
        return Reading(weakref.ref(x), name, candidates, summary)

    def _candidates_of(self, x_LNC: Tensor) -> Candidates:
        """The rows of this step to choose from; shared by all Linears of the same shape."""
        shape = (x_LNC.shape[0], x_LNC.shape[1])
        if shape not in self._candidates:
            noise_level = self._context.noise_level
            assert noise_level is not None
            keys = row_keys(*shape, self._sample_seeds, self._num_elements, noise_level)
            cells = 1 if shape[0] % self._num_elements else self._num_elements
            chosen = stratified(keys.view(cells, -1), self._rows_per_bucket)
            rows, keys, moment_rows = (part.to(x_LNC.device) for part in chosen[:3])
            self._candidates[shape] = Candidates(rows, keys, moment_rows, chosen.moment_weight)
        return self._candidates[shape]


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


def _linear(denoiser: nn.Module, name: str) -> nn.Linear:
    modules = dict(denoiser.named_modules())
    module = modules.get(name)
    if not isinstance(module, nn.Linear):
        linears = [n for n, m in modules.items() if isinstance(m, nn.Linear)]
        raise UserError(f"the model has no Linear {name!r}; {close_names(name, linears)}")
    return module
