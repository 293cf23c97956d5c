"""Models without weights: parameters that take no memory, outputs whose shapes come from the meta device.

A hollow module has the class, configuration, device (the CPU) and dtype of the real one.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from viditq.estimate.live import LiveBytes

MAX_LAYERS = 4  # of a text encoder: shapes of embeddings do not depend on how many it has
LAYER_KEYS = ("num_layers", "num_hidden_layers", "num_decoder_layers", "n_layer")


def on_meta(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """What `build` makes, on the meta device in `dtype`, in evaluation mode."""
    with init_empty_weights(include_buffers=False):
        module = build()
    return module.to(dtype).eval().requires_grad_(False)


def hollowed(module: nn.Module) -> nn.Module:
    """Parameters on meta replaced, in place, by zeros of the same shape that share one element in memory."""
    for parent in module.modules():
        for name, parameter in parent._parameters.items():
            if parameter is not None and parameter.is_meta:
                zero = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                parent._parameters[name] = nn.Parameter(zero, requires_grad=False)
    return module


def twin_on_meta(module: nn.Module) -> nn.Module:
    """A copy on the meta device; no parameter is copied in memory, where one of a hollow module would become dense."""
    known: dict[int, Any] = {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in module.parameters()}
    return copy.deepcopy(module, known).to("meta")


class _Autocast(torch.autocast):
    """torch's, which knows no device meta: there it does what it does on a CPU, nothing where it is switched off."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "meta" else device_type, *args, **kwargs)


@contextmanager
def autocast_on_meta() -> Iterator[None]:
    """Within, models that switch autocast off on the device of their inputs (Cosmos 3, OmniGen) run on meta too."""
    plain = torch.autocast
    torch.autocast = _Autocast  # type: ignore[misc]
    try:
        yield
    finally:
        torch.autocast = plain  # type: ignore[misc]


def as_meta(value: Any) -> Any:
    """Tensors of a nested value, on meta."""
    return tree_map_only(Tensor, lambda t: t.to("meta"), value)


def as_zeros(value: Any) -> Any:
    """Tensors of a nested value, as zeros on the CPU that share one element in memory."""
    return tree_map_only(Tensor, lambda t: torch.zeros((), dtype=t.dtype).expand(t.shape), value)


def answer_from_meta(module: nn.Module, tell: Callable[[int], None] = lambda nbytes: None) -> None:
    """Lets a hollow module answer zeros of the shapes that its twin on meta returns, wherever these can be followed;
    tell: is told the most bytes that tensors took meanwhile."""
    forward, twin, signature = module.forward, twin_on_meta(module), inspect.signature(module.forward)

    @functools.wraps(forward)
    def answered(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.arguments.pop("attention_mask", None)  # its values are looked at, and change no shape
        try:
            with LiveBytes() as live:
                found = twin(*as_meta(given.args), **as_meta(given.kwargs))
            tell(live.peak)
            return as_zeros(found)
        except (RuntimeError, NotImplementedError):  # it looks at values
            return forward(*args, **kwargs)

    module.forward = answered


def shallow(config: Any) -> Any:
    """A text encoder's configuration with few layers."""
    config = copy.deepcopy(config)
    for part in (config, getattr(config, "text_config", None)):
        for key in LAYER_KEYS:
            value = getattr(part, key, None)
            if isinstance(value, int):
                setattr(part, key, min(value, MAX_LAYERS))
    return config
