"""PTQD: part of a quantized denoiser's error is known in advance, by noise level, and is taken back from its output.

e = eps_q - eps_fp = k eps_fp + rest; k = max(slope of e on eps_fp, 0), bias = channel mean of the rest;
eps = (eps_q - bias) / (1 + k) (He et al., arXiv 2305.10657). Being affine, it may be applied to each guidance branch
instead of the guided output. What is left, Var(rest) / (1 + k)^2, counts as noise of a stochastic sampler: it is told
to the sampler, which adds the less of its own. It is taken of the guided output, which guidance makes noisier.

Legend: K buckets of noise level, C channels of the denoiser's prediction, B batch, M values of a channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.hooks import add_hook
from viditq.quant.calibration.context import Attachment, StepContext, TimestepScaleLike, denoisers_of
from viditq.quant.calibration.noise_level import bucket_edges, interval_of
from viditq.quant.calibration.observers import NUM_BUCKETS
from viditq.quant.correction.guidance import branches, mixing_weights, watch_steps
from viditq.quant.diagnosis.arguments import LastCall
from viditq.quant.diagnosis.diagnosis import predicted, predicts_nothing

NAME = "output_correction"  # of the module below its denoiser
SUMS = ("count", "exact", "error", "exact_squared", "error_squared", "product")
GUIDED = "guided."  # prefix of the same sums over what the sampler is given
CORRECTIONS = ("ptqd", "ptqd_mean")  # the second leaves the sampler's noise as it is


class Correction(nn.Module):
    """slope [K], bias [K, C], float32; channel_axis [] of the denoiser's output.

    variance [K], float32: of what is left of the error in the corrected and guided output; None = was not fitted.
    """

    slope: Tensor
    bias: Tensor
    channel_axis: Tensor
    variance: Tensor | None

    def __init__(
        self, slope_K: Tensor, bias_KC: Tensor, channel_axis: Tensor, variance_K: Tensor | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("slope", slope_K)
        self.register_buffer("bias", bias_KC)
        self.register_buffer("channel_axis", channel_axis)
        self.register_buffer("variance", variance_K)
        self.latest: int | None = None  # bucket of the last forward

    def attach(self, denoiser: nn.Module, context: StepContext) -> None:
        """Becomes a part of the denoiser, whose outputs it corrects from now on; `context` is the denoiser's own."""
        denoiser.add_module(NAME, self)
        # before the context forgets the noise level
        add_hook(denoiser.register_forward_hook, partial(self._correct, context), prepend=True)

    def _correct(self, context: StepContext, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        assert context.noise_level is not None
        if predicts_nothing(output):
            return output
        self.latest = interval_of(bucket_edges(len(self.slope)), context.noise_level)
        return _replaced(output, partial(self.correct, self.latest))

    def correct(self, bucket: int, output: Tensor) -> Tensor:
        """(eps_q - bias) / (1 + k) of the first C channels; a learned variance behind them stays."""
        axis, num_channels = int(self.channel_axis), self.bias.shape[1]
        shape = [-1 if i == axis else 1 for i in range(output.ndim)]
        parts = list(output.split([num_channels, output.shape[axis] - num_channels], axis))
        slope, bias_C = self.slope[bucket].to(output.device), self.bias[bucket].to(output.device)  # may be offloaded
        corrected = (parts[0].float() - bias_C.view(shape)) / (1 + slope)
        return torch.cat([corrected.to(output.dtype), parts[1]], axis)


def _replaced(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The output with its prediction changed: a tensor, the first of a tuple, or `.sample`."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    output.sample = change(output.sample)
    return output


def channel_axis_of(denoiser: nn.Module, prediction: Tensor) -> int:
    """1 for images; 1 or 2 for clips, as the model's in_channels tell. UserError where channels cannot be told."""
    channels = getattr(getattr(denoiser, "config", None), "in_channels", None)
    axes = [axis for axis in (1, 2)[: prediction.ndim - 3] if channels is None or prediction.shape[axis] == channels]
    if len(axes) != 1:
        raise UserError(
            f"quant.correction does not know the channels of the output of {type(denoiser).__name__}, of shape "
            f"{list(prediction.shape)}; use quant.correction=null"
        )
    return axes[0]


def fit_correction(sums: Mapping[str, Tensor]) -> Correction:
    """From the sums of `CorrectionFit.state`; a bucket without data takes the nearest one's."""
    slope_K = slope_of(sums)
    bias_KC = (sums["error"] - slope_K[:, None] * sums["exact"]) / sums["count"][:, None]
    nearest, variance_K = _nearest(sums["count"]), None
    if f"{GUIDED}count" in sums:
        guided = {name: sums[f"{GUIDED}{name}"] for name in SUMS}
        variance_K = (rest_variance(guided, slope_K) / (1 + slope_K).square())[_nearest(guided["count"])].float()
    return Correction(slope_K[nearest].float(), bias_KC[nearest].float(), sums["channel_axis"].clone(), variance_K)


def slope_of(sums: Mapping[str, Tensor]) -> Tensor:
    """k [K] = max(slope of the error on the exact output, 0)."""
    total_K = sums["count"] * sums["exact"].shape[1]
    exact_K, error_K = sums["exact"].sum(1), sums["error"].sum(1)
    variance_K = sums["exact_squared"] - exact_K * exact_K / total_K
    slope_K: Tensor = (sums["product"] - exact_K * error_K / total_K) / variance_K
    return slope_K.nan_to_num().clamp(min=0)


def rest_variance(sums: Mapping[str, Tensor], slope_K: Tensor) -> Tensor:
    """Variance [K] of error - slope exact about its channels' means."""
    squared_K = sums["error_squared"] - 2 * slope_K * sums["product"] + slope_K.square() * sums["exact_squared"]
    of_means_K = (sums["error"] - slope_K[:, None] * sums["exact"]).square().sum(1) / sums["count"]
    return ((squared_K - of_means_K) / (sums["count"] * sums["exact"].shape[1])).clamp(min=0)


def _nearest(count_K: Tensor) -> list[int]:
    """For each bucket the nearest one with data."""
    seen = [bucket for bucket in range(len(count_K)) if count_K[bucket] > 0]
    return [min(seen, key=lambda s: abs(s - bucket)) for bucket in range(len(count_K))]


@dataclass(frozen=True)
class _Outputs:
    """Of one forward: exact and quantized prediction."""

    prefix: str
    bucket: int
    axis: int
    exact: Tensor
    quantized: Tensor


class CorrectionFit:
    """Context manager that compares `quantized_denoiser` with `float_denoiser` on its inputs while that one samples.

    State, flat, by denoiser: count [K] of values in a channel; sums over them, float64: exact, error [K, C],
    exact_squared, error_squared, product (of exact and error) [K]. Raises UserError for outputs without a channel axis.
    scheduler: a stochastic one, that of the float pipeline; the same sums are then also taken of what its steps are
    given (`guided.`), and a pipeline whose guidance is no mix of the denoiser's outputs is refused while sampling.
    """

    def __init__(
        self,
        float_denoiser: nn.Module,
        quantized_denoiser: nn.Module,
        timestep_scale: TimestepScaleLike = 1000.0,
        num_buckets: int = NUM_BUCKETS,
        scheduler: Any = None,
    ) -> None:
        self._denoiser, self._quantized, self._scheduler = float_denoiser, quantized_denoiser, scheduler
        self._context, self._edges = StepContext((0, 1), timestep_scale), bucket_edges(num_buckets)
        self._context.check(float_denoiser)
        self._sums: dict[str, Tensor] = {}
        self._last = LastCall()
        self._outputs: list[_Outputs] = []  # since the scheduler's last step

    def state(self) -> dict[str, Tensor]:
        """`<prefix><sum>` -> tensor on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self._sums.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continues from a `state()`."""
        self._sums = {name: tensor.clone() for name, tensor in state.items()}

    def __enter__(self) -> CorrectionFit:
        quantized = denoisers_of(self._quantized)
        handles = [
            part.register_forward_hook(partial(self._compare, prefix, quantized[prefix]), with_kwargs=True)
            for prefix, part in denoisers_of(self._denoiser).items()
        ]
        handles += [self._last.watch(part) for part in denoisers_of(self._denoiser).values()]
        self._attachment = Attachment([*handles, *self._context.attach(self._denoiser).handles])
        self._outputs.clear()
        if self._scheduler is not None:
            self._end = watch_steps(self._scheduler, self._add_guided)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._attachment.remove()
        if self._scheduler is not None:
            self._end()

    @torch.no_grad()
    def _compare(
        self, prefix: str, other: nn.Module, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        assert self._context.noise_level is not None
        args, kwargs = self._last.take(module)
        if predicts_nothing(output):
            return
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        exact, quantized = predicted(output, inputs), predicted(other(*args, **kwargs), inputs)
        axis = channel_axis_of(module, exact)
        bucket = interval_of(self._edges, self._context.noise_level)
        exact_CM, quantized_CM = (x.double().movedim(axis, 0).flatten(1).cpu() for x in (exact, quantized))
        self._add(prefix, bucket, exact_CM, quantized_CM - exact_CM)
        with torch.inference_mode(False):
            self._sums[f"{prefix}channel_axis"] = torch.tensor(axis)
        if self._scheduler is not None:
            self._outputs.append(_Outputs(prefix, bucket, axis, exact, quantized))

    @torch.no_grad()
    def _add_guided(self, output: Tensor, sample: Tensor) -> None:
        """Of the outputs since the last step, as the pipeline has mixed them."""
        outputs, self._outputs = self._outputs, []
        if not outputs:
            return
        last = outputs[-1]

        def by_channel(x: Tensor) -> Tensor:  # [..., B, C, M], whatever lies before B
            return x.double().cpu().movedim(last.axis - sample.ndim, 1 - sample.ndim).flatten(2 - sample.ndim)

        exact_JBCM = by_channel(branches([o.exact for o in outputs], sample))
        error_JBCM = by_channel(branches([o.quantized for o in outputs], sample)) - exact_JBCM
        guided_BCM = by_channel(predicted(output, [sample]))
        weights_JBC = mixing_weights(exact_JBCM, guided_BCM)
        error_BCM = (weights_JBC[..., None] * error_JBCM).sum(0)
        pair = (x.movedim(1, 0).flatten(1) for x in (guided_BCM, error_BCM))
        self._add(f"{last.prefix}{GUIDED}", last.bucket, *pair)

    def _add(self, prefix: str, bucket: int, exact_CM: Tensor, error_CM: Tensor) -> None:
        num_buckets = len(self._edges) - 1
        values = {
            "count": torch.tensor(float(exact_CM.shape[1]), dtype=torch.float64),
            "exact": exact_CM.sum(1),
            "error": error_CM.sum(1),
            "exact_squared": exact_CM.square().sum(),
            "error_squared": error_CM.square().sum(),
            "product": (exact_CM * error_CM).sum(),
        }
        with torch.inference_mode(False):
            for name, value in values.items():
                shape = (num_buckets, *value.shape)
                total = self._sums.setdefault(f"{prefix}{name}", torch.zeros(shape, dtype=torch.float64))
                total[bucket] += value.clone()

    @staticmethod
    def merge_states(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums of two processes as one."""
        return {n: t if n.endswith("channel_axis") else t + theirs[n] for n, t in mine.items()}


def attach_corrections(denoiser: nn.Module, state: Mapping[str, Tensor], context: StepContext) -> None:
    """Fits and attaches one correction for each denoiser that was seen. state: of `CorrectionFit`."""
    for prefix, part in denoisers_of(denoiser).items():
        if f"{prefix}count" in state:
            names = (*SUMS, "channel_axis", *(f"{GUIDED}{name}" for name in SUMS))
            sums = {name: state[f"{prefix}{name}"] for name in names if f"{prefix}{name}" in state}
            fit_correction(sums).attach(part, context)


def attach_empty(denoiser: nn.Module, tensors: Mapping[str, Tensor], context: StepContext) -> None:
    """Attaches what the tensors of a file call for, with their values still on meta."""
    for prefix, part in denoisers_of(denoiser).items():
        fields = [tensors.get(f"{prefix}{NAME}.{field}") for field in ("slope", "bias", "channel_axis", "variance")]
        slope, bias, axis, variance = (None if tensor is None else tensor.to("meta") for tensor in fields)
        if slope is not None and bias is not None and axis is not None:
            Correction(slope, bias, axis, variance).attach(part, context)


def corrections_of(denoiser: nn.Module) -> list[Correction]:
    """Those attached to a denoiser, one for each part that has one."""
    found = (getattr(part, NAME, None) for part in denoisers_of(denoiser).values())
    return [correction for correction in found if isinstance(correction, Correction)]


def latest_variance(corrections: Sequence[Correction]) -> float:
    """Of the error in what the sampler is given now: of the denoiser that ran since the last call, at its noise level.

    0 where none ran. The corrections hold a variance.
    """
    variances = [float(c.variance[c.latest]) for c in corrections if c.variance is not None and c.latest is not None]
    for correction in corrections:
        correction.latest = None
    return max(variances, default=0.0)
