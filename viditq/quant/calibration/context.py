"""StepContext: the one object that tells every QuantLinear of a denoiser where on the trajectory it is."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.hooks import add_hook
from viditq.quant.calibration.noise_level import interval_of
from viditq.quant.description.fields import checked_fields
from viditq.quant.description.plan import check_edges

ROUNDING = 1e-5  # of noise levels: SANA-Sprint tells sin / (sin + cos) of 1.5708, which is 1.000004
GIVEN = 0.01  # noise level up to which tokens count as given: a first frame is told 0, or next to it


class Attachment:
    """Undo handle of several hooks."""

    def __init__(self, handles: Sequence[torch.utils.hooks.RemovableHandle]) -> None:
        self.handles = handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@dataclass(frozen=True)
class TimestepScale:
    """How a denoiser is told the noise level: the value of `argument` at pure noise and at none, linear in between.

    Raises UserError where the two values are equal.
    """

    at_noise: float = 1000.0
    at_clean: float = 0.0
    argument: str = "timestep"

    def __post_init__(self) -> None:
        if self.at_noise == self.at_clean:
            raise UserError(f"timestep_scale: at_noise and at_clean are both {self.at_noise:g}; they must differ")

    @classmethod
    def of(cls, value: float | Mapping[str, Any]) -> TimestepScale:
        """A number is the timestep at pure noise; a mapping holds the fields."""
        if isinstance(value, Mapping):
            return cls(**checked_fields(cls, value, "timestep_scale"))
        return cls(at_noise=float(value))

    def noise_level(self, timestep: float) -> float:
        """In [0, 1]; raises UserError for timesteps outside of the scale."""
        level = (timestep - self.at_clean) / (self.at_noise - self.at_clean)
        if not -ROUNDING <= level <= 1 + ROUNDING:
            raise UserError(
                f"timestep {timestep:g} lies outside [{self.at_clean:g}, {self.at_noise:g}]; "
                "set timestep_scale to the model's timestep at pure noise"
            )
        return min(max(level, 0.0), 1.0)

    def of_step(self, timestep: Tensor | float) -> float:
        """The timestep of one step; where each token has its own, that of those being denoised.

        Raises UserError for samples at different steps, and for tokens that are neither at theirs nor given (clean).
        """
        if not isinstance(timestep, Tensor):
            return float(timestep)
        values = timestep.detach().reshape(len(timestep) if timestep.ndim > 1 else timestep.numel(), -1)
        low, high = values.aminmax(dim=1)
        noisiest = high if self.at_noise > self.at_clean else low
        first = float(noisiest[0])
        if not bool((noisiest == noisiest[0]).all()):
            listed = values.flatten().tolist()[:4]
            raise UserError(f"one batch has different timesteps ({listed} ...); sample all prompts in step")
        near = GIVEN * abs(self.at_noise - self.at_clean)
        between = (values != first) & ((values - self.at_clean).abs() > near)
        if timestep.ndim > 1 and bool(between.any()):
            raise UserError(
                f"tokens of one sample are at noise levels of their own ({float(values[between][0]):g} beside "
                f"{first:g}); only those that are given, and so are clean, may differ from the others"
            )
        return first


TimestepScaleLike = float | Mapping[str, Any] | None
"""The timestep at pure noise, or the fields of a TimestepScale; None: the model has no timestep."""


def denoisers_of(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Prefix of names -> denoiser: {"": denoiser}, or one each for an nn.ModuleDict of several of one pipeline."""
    if isinstance(denoiser, nn.ModuleDict):
        return {f"{name}.": part for name, part in denoiser.items()}
    return {"": denoiser}


class StepContext:
    """noise_level in [0, 1] (1 = pure noise) and segment of `edges`, both None outside a forward of the
    denoiser. With a single segment the timestep is read when the noise level is first asked for, so that a denoiser
    that never asks is compiled into one graph.

    timestep_scale: the `timestep` argument at pure noise, or a TimestepScale's fields; None for a model without a
    timestep, whose noise level is always 0: UserError unless there is a single segment. Several denoisers of one
    pipeline run one after another and share the context. A copy of a denoiser has a context of its own.
    """

    def __init__(self, edges: Sequence[float], timestep_scale: TimestepScaleLike = 1000.0) -> None:
        self.edges = check_edges(edges, "edges")
        self.timestep_scale = timestep_scale
        if timestep_scale is None and len(self.edges) > 2:
            raise UserError(
                f"timestep_scale=None stands for a model without a timestep, which has no {len(self.edges) - 1} "
                "segments of noise levels; use segments=(0, 1)"
            )
        self._scale = None if timestep_scale is None else TimestepScale.of(timestep_scale)
        self.segment: int | None = None
        self._timestep: Tensor | float | None = None
        self._noise_level: float | None = None

    @property
    def noise_level(self) -> float | None:
        """As the class says. Raises UserError as `TimestepScale.of_step`, and off the scale."""
        if self._noise_level is None and self._timestep is not None:
            assert self._scale is not None
            self._noise_level = self._scale.noise_level(self._scale.of_step(self._timestep))
        return self._noise_level

    def attach(self, denoiser: nn.Module) -> Attachment:
        """Reads each denoiser's own timestep argument before its forwards; UserError if it has none."""
        self.check(denoiser)
        handles = [handle for part in denoisers_of(denoiser).values() for handle in self._attach(part)]
        return Attachment(handles)

    def check(self, denoiser: nn.Module) -> None:
        """Raises UserError unless `reads` says yes."""
        for part in denoisers_of(denoiser).values():
            if self._scale is not None and not self.reads(part):
                names = ", ".join(inspect.signature(part.forward).parameters)
                raise UserError(
                    f"{type(part).__name__}.forward takes no argument {self._scale.argument!r} (it takes: {names}); "
                    "name the one that holds the timestep in timestep_scale, wrap the model, or give "
                    "timestep_scale=None where it has no timestep"
                )

    def reads(self, denoiser: nn.Module) -> bool:
        """Whether a denoiser's forward has the argument that holds the timestep, or need not have it."""
        scale, parts = self._scale, denoisers_of(denoiser).values()
        return scale is None or all(scale.argument in inspect.signature(part.forward).parameters for part in parts)

    def _attach(self, denoiser: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
        named = inspect.signature(denoiser.forward).parameters.values()
        positional = [one.name for one in named if one.kind is not inspect.Parameter.KEYWORD_ONLY]
        return [
            add_hook(
                denoiser.register_forward_pre_hook, partial(self._enter, positional), with_kwargs=True, prepend=True
            ),
            add_hook(denoiser.register_forward_hook, self._leave, always_call=True),
        ]

    def _enter(self, positional: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._scale is None:
            self._noise_level, self.segment = 0.0, 0
        else:
            given = dict(zip(positional, args, strict=False)) | kwargs
            self.set_timestep(given.get(self._scale.argument))

    def _leave(self, *_: Any) -> None:
        self._noise_level = self._timestep = self.segment = None

    def set_timestep(self, timestep: Tensor | float | None) -> None:
        """UserError for none, and with several segments as `noise_level`."""
        assert self._scale is not None
        if timestep is None:
            raise UserError(f"the denoiser was called without a timestep; pass {self._scale.argument}=...")
        self._noise_level, self._timestep = None, timestep
        if len(self.edges) == 2:
            self.segment = 0
            return
        level = self.noise_level
        assert level is not None
        self.segment = interval_of(self.edges, level)
