"""StepContext: the one object that tells every QuantLinear of a denoiser where on the trajectory it is."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.quant.noise_level import interval_of
from viditq.quant.plan import check_edges


class Attachment:
    """Undo handle of several hooks."""

    def __init__(self, handles: Sequence[torch.utils.hooks.RemovableHandle]) -> None:
        self.handles = handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


class StepContext:
    """noise_level in [0, 1] (1 = pure noise) and segment of `edges`, both None outside a forward of the
    denoiser.

    timestep_scale: the `timestep` argument at pure noise.
    """

    def __init__(self, edges: Sequence[float], timestep_scale: float = 1000.0) -> None:
        self.edges = check_edges(edges, "edges")
        self.timestep_scale = timestep_scale
        self.noise_level: float | None = None
        self.segment: int | None = None

    def attach(self, denoiser: nn.Module) -> Attachment:
        """Reads the denoiser's own `timestep` argument before each forward; UserError if it has none."""
        signature = inspect.signature(denoiser.forward)
        if "timestep" not in signature.parameters:
            names = ", ".join(signature.parameters)
            raise UserError(
                f"{type(denoiser).__name__}.forward takes no argument 'timestep' (it takes: {names}); wrap it"
            )

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.set_timestep(signature.bind_partial(*args, **kwargs).arguments.get("timestep"))

        def leave(*_: Any) -> None:
            self.noise_level = self.segment = None

        return Attachment(
            [
                denoiser.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
                denoiser.register_forward_hook(leave, always_call=True),
            ]
        )

    def set_timestep(self, timestep: Tensor | float | None) -> None:
        """Raises UserError unless all entries are equal and lie in [0, timestep_scale]."""
        if timestep is None:
            raise UserError("the denoiser was called without a timestep; pass timestep=...")
        value = _single_value(timestep)
        if not 0 <= value <= self.timestep_scale:
            raise UserError(
                f"timestep {value:g} lies outside [0, {self.timestep_scale:g}]; "
                "set timestep_scale to the model's timestep at pure noise"
            )
        self.noise_level = value / self.timestep_scale
        self.segment = interval_of(self.edges, self.noise_level)


def _single_value(timestep: Tensor | float) -> float:
    if not isinstance(timestep, Tensor):
        return float(timestep)
    values = timestep.detach().flatten()
    first = float(values[0])
    if values.numel() > 1 and not bool((values == values[0]).all()):
        raise UserError(f"one batch has different timesteps ({values.tolist()[:4]} ...); sample all prompts in step")
    return first
