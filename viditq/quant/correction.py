"""PTQD: part of a quantized denoiser's error is known in advance, by noise level, and is taken back from its output.

e = eps_q - eps_fp = k eps_fp + rest; k = max(slope of e on eps_fp, 0), bias = channel mean of the rest;
eps = (eps_q - bias) / (1 + k) (He et al., arXiv 2305.10657). Being affine, it may be applied to each guidance branch
instead of the guided output. The paper's third part, a smaller variance of stochastic samplers, is left out.

Legend: K buckets of noise level, C channels of the denoiser's prediction, B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.quant.context import Attachment, StepContext, TimestepScaleLike, denoisers_of
from viditq.quant.diagnosis import predicted
from viditq.quant.noise_level import bucket_edges, interval_of
from viditq.quant.observers import NUM_BUCKETS

NAME = "output_correction"  # of the module below its denoiser
SUMS = ("count", "exact", "error", "exact_squared", "product")
CORRECTIONS = ("ptqd",)


class Correction(nn.Module):
    """slope [K], bias [K, C], float32; channel_axis [] of the denoiser's output."""

    slope: Tensor
    bias: Tensor
    channel_axis: Tensor

    def __init__(self, slope_K: Tensor, bias_KC: Tensor, channel_axis: Tensor) -> None:
        super().__init__()
        self.register_buffer("slope", slope_K)
        self.register_buffer("bias", bias_KC)
        self.register_buffer("channel_axis", channel_axis)

    def attach(self, denoiser: nn.Module, context: StepContext) -> None:
        """Becomes a part of the denoiser, whose outputs it corrects from now on; `context` is the denoiser's own."""
        edges = bucket_edges(len(self.slope))

        def correct(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            assert context.noise_level is not None
            return _replaced(output, partial(self.correct, interval_of(edges, context.noise_level)))

        denoiser.add_module(NAME, self)
        denoiser.register_forward_hook(correct, prepend=True)  # before the context forgets the noise level

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
            f"quant.correction=ptqd does not know the channels of the output of {type(denoiser).__name__}, of shape "
            f"{list(prediction.shape)}; use quant.correction=null"
        )
    return axes[0]


def fit_correction(sums: Mapping[str, Tensor]) -> Correction:
    """From the sums of `CorrectionFit.state`; a bucket without data takes the nearest one's."""
    count_K, total_K = sums["count"], sums["count"] * sums["exact"].shape[1]
    exact_K, error_K = sums["exact"].sum(1), sums["error"].sum(1)
    variance_K = sums["exact_squared"] - exact_K * exact_K / total_K
    slope_K = ((sums["product"] - exact_K * error_K / total_K) / variance_K).nan_to_num().clamp(min=0)
    bias_KC = (sums["error"] - slope_K[:, None] * sums["exact"]) / count_K[:, None]
    seen = [bucket for bucket in range(len(count_K)) if count_K[bucket] > 0]
    nearest = [min(seen, key=lambda s: abs(s - bucket)) for bucket in range(len(count_K))]
    return Correction(slope_K[nearest].float(), bias_KC[nearest].float(), sums["channel_axis"].clone())


class CorrectionFit:
    """Context manager that compares `quantized_denoiser` with `float_denoiser` on its inputs while that one samples.

    State, flat, by denoiser: count [K] of values in a channel; sums over them, float64: exact, error [K, C],
    exact_squared, product (of exact and error) [K]. Raises UserError for outputs without a channel axis.
    """

    def __init__(
        self,
        float_denoiser: nn.Module,
        quantized_denoiser: nn.Module,
        timestep_scale: TimestepScaleLike = 1000.0,
        num_buckets: int = NUM_BUCKETS,
    ) -> None:
        self._denoiser, self._quantized = float_denoiser, quantized_denoiser
        self._context, self._edges = StepContext((0, 1), timestep_scale), bucket_edges(num_buckets)
        self._sums: dict[str, Tensor] = {}

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
        self._attachment = Attachment([*handles, *self._context.attach(self._denoiser).handles])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._attachment.remove()

    @torch.no_grad()
    def _compare(
        self, prefix: str, other: nn.Module, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        assert self._context.noise_level is not None
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        exact, quantized = predicted(output, inputs), predicted(other(*args, **kwargs), inputs)
        axis = channel_axis_of(module, exact)
        exact_CM, quantized_CM = (x.double().movedim(axis, 0).flatten(1).cpu() for x in (exact, quantized))
        self._add(prefix, interval_of(self._edges, self._context.noise_level), exact_CM, quantized_CM, axis)

    def _add(self, prefix: str, bucket: int, exact_CM: Tensor, quantized_CM: Tensor, axis: int) -> None:
        error_CM, num_buckets = quantized_CM - exact_CM, len(self._edges) - 1
        values = {
            "count": torch.tensor(float(exact_CM.shape[1]), dtype=torch.float64),
            "exact": exact_CM.sum(1),
            "error": error_CM.sum(1),
            "exact_squared": exact_CM.square().sum(),
            "product": (exact_CM * error_CM).sum(),
        }
        with torch.inference_mode(False):
            for name, value in values.items():
                shape = (num_buckets, *value.shape)
                total = self._sums.setdefault(f"{prefix}{name}", torch.zeros(shape, dtype=torch.float64))
                total[bucket] += value.clone()
            self._sums[f"{prefix}channel_axis"] = torch.tensor(axis)

    @staticmethod
    def merge_states(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums of two processes as one."""
        return {n: t if n.endswith("channel_axis") else t + theirs[n] for n, t in mine.items()}


def attach_corrections(denoiser: nn.Module, state: Mapping[str, Tensor], context: StepContext) -> None:
    """Fits and attaches one correction for each denoiser that was seen. state: of `CorrectionFit`."""
    for prefix, part in denoisers_of(denoiser).items():
        if f"{prefix}count" in state:
            sums = {name: state[f"{prefix}{name}"] for name in (*SUMS, "channel_axis")}
            fit_correction(sums).attach(part, context)


def attach_empty(denoiser: nn.Module, tensors: Mapping[str, Tensor], context: StepContext) -> None:
    """Attaches what the tensors of a file call for, with their values still on meta."""
    for prefix, part in denoisers_of(denoiser).items():
        names = [f"{prefix}{NAME}.{field}" for field in ("slope", "bias", "channel_axis")]
        if names[0] in tensors:
            Correction(*(tensors[name].to("meta") for name in names)).attach(part, context)
