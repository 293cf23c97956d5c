"""Diagnosis: where the error of a quantized denoiser comes from, by layer and by noise level."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from viditq.errors import UserError, close_names
from viditq.quant.calibration.context import Attachment, StepContext, TimestepScaleLike, denoisers_of
from viditq.quant.calibration.noise_level import bucket_edges, interval_of
from viditq.quant.calibration.observers import NUM_BUCKETS
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.scheme import FLOAT_BITS
from viditq.quant.diagnosis.arguments import LastCall
from viditq.quant.diagnosis.error_sums import ErrorSums
from viditq.quant.execution.linear import QuantLinear, quant_linears
from viditq.quant.execution.model_linears import linear_names


class Diagnosis:
    """Context manager that measures `quantized_denoiser` while `float_denoiser` samples.

    While active, every forward of the float denoiser also runs (1) each QuantLinear on the input of the Linear it
    stands for, with the variant of the current noise level, and (2) the quantized denoiser on the same arguments.
    The float denoiser's outputs are not touched. The two may differ in dtype, share no module, and lie on one device.
    Call `add_prompts` once per sampled batch; the sums are always up to date and do not depend on the order of batches.

    timestep_scale: the `timestep` argument at pure noise. Raises UserError when plan and denoisers do not belong
    together, and while sampling when an output is not finite.
    """

    def __init__(
        self,
        float_denoiser: nn.Module,
        quantized_denoiser: nn.Module,
        plan: QuantPlan,
        timestep_scale: TimestepScaleLike = 1000.0,
        num_buckets: int = NUM_BUCKETS,
    ) -> None:
        self._denoiser, self._quantized, self._plan = float_denoiser, quantized_denoiser, plan
        self._linears = _linears(float_denoiser, plan)
        self._quant_linears = _quant_linears(float_denoiser, quantized_denoiser, plan)
        self._context = StepContext((0, 1), timestep_scale)
        self._edges = bucket_edges(num_buckets)
        self._attachments: list[Attachment] = []
        self._last = LastCall()
        self.sums = ErrorSums(list(plan.layers), num_buckets)

    def add_prompts(self, count: int) -> None:
        """Says that `count` prompts have been sampled (guidance branches hide their number from the denoiser)."""
        self.sums.num_prompts += count

    def state(self) -> dict[str, Tensor]:
        """Everything measured so far, as flat tensors for safetensors; `error_sums.REDUCTIONS` says how to join two."""
        return self.sums.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continues from a `state()`; raises UserError when it was made with other layers or sizes."""
        self.sums.load_state(state)

    def merge(self, other: Diagnosis) -> None:
        """Adds what `other` measured on other prompts, with the same plan and buckets."""
        self.sums.merge(other.sums)

    def __enter__(self) -> Diagnosis:
        quantized = denoisers_of(self._quantized)
        handles = [
            part.register_forward_hook(partial(self._measure_output, quantized[prefix]), with_kwargs=True)
            for prefix, part in denoisers_of(self._denoiser).items()
        ]
        handles += [self._last.watch(part) for part in denoisers_of(self._denoiser).values()]
        for row, (name, linear) in enumerate(self._linears.items()):
            handles.append(linear.register_forward_hook(self._layer_hook(row, name)))
        # The float denoiser also moves the quantized one's context: its layers are called outside their own denoiser.
        contexts = {id(c): c for c in [self._context, *(q.context for q in self._quant_linears.values())]}
        self._attachments = [Attachment(handles), *(c.attach(self._denoiser) for c in contexts.values())]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for attachment in self._attachments:
            attachment.remove()

    def _layer_hook(self, row: int, name: str) -> Any:
        quantized = self._quant_linears[name]

        @torch.no_grad()
        def measure(linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if self._context.noise_level is None:
                raise UserError(f"{name} was called outside its denoiser while diagnosing")
            bucket = interval_of(self._edges, self._context.noise_level)
            self.sums.add_error(row, bucket, quantized(args[0].to(quantized.dtype)), output)
            self.sums.add_range(row, bucket, args[0])

        return measure

    @torch.no_grad()
    def _measure_output(
        self, other: nn.Module, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        assert self._context.noise_level is not None
        bucket = interval_of(self._edges, self._context.noise_level)
        args, kwargs = self._last.take(module)
        if predicts_nothing(output):
            return
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        quantized, exact = (predicted(out, inputs) for out in (other(*args, **kwargs), output))
        self.sums.add_error(-1, bucket, quantized, exact)
        self._check_finite(bucket)

    def _check_finite(self, bucket: int) -> None:
        finite = (self.sums.squared_error[:, bucket] + self.sums.squared_norm[:, bucket]).isfinite()
        if not finite.all():
            row = int((~finite).nonzero()[0])
            where = [*(f"layer {name}" for name in self._linears), "the denoiser"][row]
            raise UserError(
                f"the output of {where} is not finite, as float or quantized; check the model in this dtype, "
                "or use more bits"
            )

    def to_json(self, roles: Mapping[str, str]) -> dict[str, Any]:
        """Plain values for errors.json, layers in the plan's order. roles: Linear -> role, for each of them.

        relative_error = ||quantized(x) - float(x)|| / ||float(x)|| over all inputs x of a bucket; None where no
        sampling step falls into the bucket. Raises UserError before any prompt was added, or when a role is missing.
        """
        sums = self.sums
        if not int(sums.num_prompts):
            raise UserError("nothing was diagnosed yet: sample inside the diagnosis, then call add_prompts")
        missing = [name for name in sums.layer_names if name not in roles]
        if missing:
            raise UserError(f"{len(missing)} layers have no role, first {missing[0]}; give one for each layer")
        return {
            "num_prompts": int(sums.num_prompts),
            "bucket_edges": list(self._edges),
            "denoiser": {"relative_error": _ratios(sums.squared_error[-1], sums.squared_norm[-1])},
            "layers": {name: self._layer(row, name, roles[name]) for row, name in enumerate(sums.layer_names)},
        }

    def _layer(self, row: int, name: str, role: str) -> dict[str, Any]:
        sums, schemes = self.sums, [self._plan.scheme(name, segment) for segment in range(self._plan.num_segments)]
        error, norm = sums.squared_error[row], sums.squared_norm[row]
        return {
            "role": role,
            "weight_bits": [_bits(s.weight if s else None) for s in schemes],
            "activation_bits": [_bits(s.activation if s else None) for s in schemes],
            "relative_error": _ratios(error, norm),
            "total": _ratios(error.sum(0, keepdim=True), norm.sum(0, keepdim=True))[0],
            "minimum": _finite(sums.minimum[row]),
            "maximum": _finite(sums.maximum[row]),
            "amax": _finite(torch.maximum(-sums.minimum[row], sums.maximum[row])),
        }


def predicts_nothing(output: Any) -> bool:
    """Whether a call only wrote into a cache of keys and values (AnyFlow-FAR, after each chunk)."""
    return isinstance(output, tuple) and output[0] is None


def predicted(output: Any, inputs: Sequence[Tensor]) -> Tensor:
    """What a denoiser predicts: its tensor, the first of its tuple, or `.sample`, as diffusers' denoisers return.

    Where latents [B, ...] of four or more axes come back with one axis doubled, the second half is a learned
    variance; the pipelines drop it, and so does this. Raises UserError for other outputs.
    """
    if isinstance(output, tuple):
        output = output[0]
    output = getattr(output, "sample", output)
    if isinstance(output, list) and output and all(isinstance(part, Tensor) for part in output):
        return torch.cat([part.flatten() for part in output])  # samples of different sizes, one tensor each
    if not isinstance(output, Tensor):
        raise UserError(f"the denoiser returned {type(output).__name__}; it must be a tensor, a tuple or have .sample")
    for x in inputs:
        if x.ndim == output.ndim >= 4:
            axes = [axis for axis, (a, b) in enumerate(zip(x.shape, output.shape, strict=True)) if a != b]
            if len(axes) == 1 and output.shape[axes[0]] == 2 * x.shape[axes[0]]:
                return output.narrow(axes[0], 0, x.shape[axes[0]])
    return output


def _ratios(squared_error: Tensor, squared_norm: Tensor) -> list[float | None]:
    pairs = zip(squared_error.tolist(), squared_norm.tolist(), strict=True)
    return [math.sqrt(error / norm) if norm else None for error, norm in pairs]


def _finite(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _bits(spec: QuantSpec | None) -> int:
    return FLOAT_BITS if spec is None else spec.bits


def _linears(denoiser: nn.Module, plan: QuantPlan) -> dict[str, nn.Module]:
    names = linear_names(denoiser)
    for name in plan.layers:
        if name not in names:
            raise UserError(f"the float denoiser has no Linear {name!r}; {close_names(name, names)}")
    return {name: denoiser.get_submodule(name) for name in plan.layers}


def _quant_linears(float_denoiser: nn.Module, denoiser: nn.Module, plan: QuantPlan) -> dict[str, QuantLinear]:
    found = quant_linears(denoiser)
    if differing := sorted(found.keys() ^ plan.layers.keys()):
        raise UserError(f"the quantized denoiser was not made by this plan: they differ in {differing[0]}")
    if any(layer.context.edges != plan.edges for layer in found.values()):
        raise UserError("the quantized denoiser was not made by this plan: its segments are others")
    if not {*float_denoiser.modules()}.isdisjoint(denoiser.modules()):
        raise UserError("the float and the quantized denoiser share modules; quantize a copy of the float one")
    return found
