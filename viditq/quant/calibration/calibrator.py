"""Calibration: ordinary sampling with observers on the inputs of the Linears.

Legend: L leading axis of a Linear's input, N tokens, C in_features; P prompts, E elements of the denoiser's
batch (E = branches P for guidance), F = L / E frames (or patches) of one element.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.on_disk import runs_in
from viditq.quant.calibration.context import Attachment, TimestepScaleLike, denoisers_of
from viditq.quant.calibration.input_groups import InputGroups
from viditq.quant.calibration.moments import Moments, matrix_bytes, of_moments
from viditq.quant.calibration.observer_bank import ObserverBank, kept_as
from viditq.quant.calibration.observers import NUM_BUCKETS, REDUCTIONS, ROWS_PER_BUCKET, blank_state
from viditq.quant.calibration.row_sample import Candidates
from viditq.quant.calibration.statistics import CalibrationStats
from viditq.quant.calibration.step_rows import StepRows, checked_linears, rows_of, with_tokens
from viditq.quant.calibration.summary import Summary, summary_of

PENDING_BYTES = 2**22  # that what inputs have shown may take at a step's end before it is added to the statistics

Kind = tuple[str, int, torch.device, torch.dtype]
"""Layers that could share statistics: denoiser, width, device, type that they compute in."""


class Like(NamedTuple):
    """What inputs added at once have in common: bank of their observers, number of candidate rows, device."""

    kind: Kind
    num_rows: int
    device: torch.device


@dataclass
class Reading:
    """An input that was read in this step: held weakly, so that it can be freed; what it adds.

    leader: the first of its readers whose moments are wanted.
    """

    tensor: weakref.ref[Tensor]
    candidates: Candidates
    summary: Summary
    leader: str | None = None

    def still(self, x: Tensor) -> bool:
        """Whether `x` is this input (q, k and v read one); one whose candidate rows were changed in place is not."""
        return self.tensor() is x and torch.equal(self.summary.rows, rows_of(x, self.candidates.rows))


class Calibrator:
    """Context manager that observes the named Linears of `denoiser` while it samples.

    denoiser: one, or an nn.ModuleDict of those of one pipeline, whose layers are then named `<denoiser>.<layer>`.

    Call `set_sample_seeds` before each batch. Results do not depend on the order of the batches, nor, but for the
    rounding of sums, on how prompts are batched. Layers that have read the same inputs so far share one observer.
    moment_layers: those whose second moments are wanted too (`QuantPlan.moment_layers`); summed: those of them whose
    sums this pass takes (None = all), while it learns of all who shares an input. Raises UserError for NaN or inf, a
    few steps late where a model is small.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        layer_names: Sequence[str],
        timestep_scale: TimestepScaleLike = 1000.0,
        num_buckets: int = NUM_BUCKETS,
        rows_per_bucket: int = ROWS_PER_BUCKET,
        moment_layers: Sequence[str] = (),
        summed: Sequence[str] | None = None,
    ) -> None:
        assert set(moment_layers) <= set(layer_names)
        self._denoiser, self._moment_layers = denoiser, frozenset(moment_layers)
        self._summed = self._moment_layers if summed is None else frozenset(summed)
        self._linears = checked_linears(denoiser, layer_names)
        self._step = StepRows(denoiser, timestep_scale, num_buckets, rows_per_bucket)
        self._sizes = num_buckets, rows_per_bucket
        self._readings: dict[int, Reading] = {}  # by the id of the input
        self._seen: dict[str, list[Summary]] = {}  # in this step, in the order of the first calls
        self._attachment: Attachment | None = None
        self._kind_of = {name: kind_of(denoiser, name, linear) for name, linear in self._linears.items()}
        self._forget_pending()
        self._stats = CalibrationStats({})
        kinds: dict[Any, list[str]] = {}
        for name, kind in self._kind_of.items():
            kinds.setdefault(kind, []).append(name)
        self._group(kinds)
        self._stats.layers = {name: self._stats.layers[name] for name in self._linears}  # in the order given

    def _group(self, groups: Mapping[Any, Sequence[str]]) -> None:
        """Begin with layers that share their observers, none of which has seen anything."""
        self._groups = InputGroups(groups.values())
        leaders: dict[Kind, list[str]] = {}
        for leader in self._groups.members:
            leaders.setdefault(self._kind_of[leader], []).append(leader)
        num_buckets, num_rows = self._sizes
        self._banks = {
            (prefix, width, device, dtype): ObserverBank(names, num_buckets, width, num_rows, device, dtype)
            for (prefix, width, device, dtype), names in leaders.items()
        }
        self._hold_observers()

    def _hold_observers(self) -> None:
        for leader, layers in self._groups.members.items():
            observer = self._banks[self._kind_of[leader]].observers[leader]
            self._stats.layers |= dict.fromkeys(layers, observer)

    @property
    def stats(self) -> CalibrationStats:
        """Statistics of everything observed so far."""
        self._flush()
        return self._stats

    @property
    def max_bytes(self) -> int:
        """What the statistics can take in memory and in their file: all of it but what layers turn out to share."""
        num_buckets, num_rows = self._sizes
        states = [
            blank_state((), num_buckets, width, num_rows, "meta", kept_as(dtype))
            for _, width, _, dtype in self._kind_of.values()
        ]
        fixed = sum(tensor.nbytes for state in states for tensor in state.values())
        return fixed + sum(matrix_bytes(self._linears[name].in_features) for name in self._summed)

    def set_sample_seeds(self, seeds: Sequence[int]) -> None:
        """One whole number per prompt of the coming batch, the same whenever that prompt is sampled."""
        self._step.sample_seeds = list(seeds)

    def state(self) -> dict[str, Tensor]:
        """Everything observed so far, as flat tensors for safetensors."""
        return self.stats.to_tensors()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continues from a `state()`; raises UserError when it was made with other layers or sizes."""
        given = CalibrationStats.from_tensors(state)
        if given.shapes != self.stats.shapes:
            raise UserError("the saved calibration state has other layers or sizes than this model")
        groups: dict[Any, list[str]] = {}
        for name, kind in self._kind_of.items():
            groups.setdefault((kind, id(given.layers[name])), []).append(name)
        self._group(groups)
        for leader in self._groups.members:
            self._banks[self._kind_of[leader]].hold_rows_as(given.layers[leader].rows.dtype)
        for leader in self._groups.members:
            observer = self._banks[self._kind_of[leader]].observers[leader]
            for field in REDUCTIONS:
                getattr(observer, field).copy_(getattr(given.layers[leader], field))
        self._stats.moments = Moments.from_tensors({key: state[key].clone() for key in of_moments(state)})

    def __enter__(self) -> Calibrator:
        parts = denoisers_of(self._denoiser).values()
        handles = [part.register_forward_hook(self._end_step, always_call=True) for part in parts]
        for name, linear in self._linears.items():
            handles.append(linear.register_forward_pre_hook(self._observer_hook(name)))
        self._attachment = Attachment([*handles, *self._step.attach()])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._attachment is not None
        self._attachment.remove()
        if error is None:
            self._flush()
        self._forget_pending()

    def _observer_hook(self, name: str) -> Any:
        def observe(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self._step.bucket is None:
                raise UserError(f"{name} was called outside its denoiser while calibrating")
            x = args[0]
            if not x.numel():
                return  # a stream without tokens yet: AnyFlow-FAR's older frames, in its first chunk
            reading = self._readings.get(id(x))
            if reading is None or not reading.still(x):
                reading = self._readings[id(x)] = self._read(x)
            self._seen.setdefault(name, []).append(reading.summary)
            if name in self._moment_layers:
                self._add_moments(name, x, reading)

        return observe

    def _end_step(self, module: nn.Module, args: Any, output: Any) -> None:
        """Only now it is known which layers have read the same."""
        seen, bucket = self._seen, self._step.bucket
        self._seen, self._readings = {}, {}
        if output is None or bucket is None:
            return  # the step has failed
        came = self._groups.refine({name: [*map(id, summaries)] for name, summaries in seen.items()})
        if came:
            self._flush()
            for kind, bank in self._banks.items():
                bank.grow({new: old for new, old in came.items() if self._kind_of[new] == kind})
            self._hold_observers()
        for layer, summaries in seen.items():
            if layer in self._groups.members:
                for summary in summaries:
                    self._add(layer, bucket, summary)
        if self._pending_bytes > PENDING_BYTES:
            self._flush()

    def _add(self, leader: str, bucket: int, summary: Summary) -> None:
        like = Like(self._kind_of[leader], len(summary.rows), summary.rows.device)
        if (leader, bucket) in self._pending.get(like, ()):  # called again at this noise level
            self._flush()
        self._pending.setdefault(like, {})[leader, bucket] = summary
        self._readers.append((leader, summary))
        self._pending_bytes += summary.nbytes

    @torch.no_grad()
    def _add_moments(self, name: str, x: Tensor, reading: Reading) -> None:
        reading.leader = reading.leader or name
        summed = reading.leader == name and name in self._summed
        rows_nC = rows_of(x, reading.candidates.moment_rows) if summed else None
        self._stats.moments.add(name, reading.leader, rows_nC, reading.candidates.moment_weight)

    @torch.no_grad()
    def _flush(self) -> None:
        pending, readers = self._pending, self._readers
        self._forget_pending()
        if not all([self._banks[like.kind].update(seen) for like, seen in pending.items()]):
            layer = next(name for name, summary in readers if not summary.finite)
            raise UserError(
                f"the input of {layer} contains NaN or inf; check the model in this dtype before calibrating"
            )

    def _forget_pending(self) -> None:
        self._pending: dict[Like, dict[tuple[str, int], Summary]] = {}
        self._pending_bytes = 0
        self._readers: list[tuple[str, Summary]] = []  # in the order in which they were called

    @torch.no_grad()
    def _read(self, x: Tensor) -> Reading:
        x_LNC = with_tokens(x)
        candidates = self._step.candidates(x_LNC)
        summary = summary_of(x_LNC, candidates.rows, candidates.keys, self._step.noise_level)
        return Reading(weakref.ref(x), candidates, summary)


def kind_of(denoiser: nn.Module, name: str, linear: nn.Linear) -> Kind:
    """What layers that share statistics have in common."""
    prefix = next(prefix for prefix in denoisers_of(denoiser) if name.startswith(prefix))
    return prefix, linear.in_features, linear.weight.device, runs_in(linear)
