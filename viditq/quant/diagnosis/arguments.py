"""Arguments of a denoiser's call, kept as they were: pipelines and denoisers change some of them in place."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Call = tuple[tuple[Any, ...], dict[str, Any]]


class LastCall:
    """What modules were last called with, as it was before they wrote into it."""

    def __init__(self) -> None:
        self._calls: dict[nn.Module, Call] = {}

    def watch(self, module: nn.Module) -> RemovableHandle:
        """From now on its calls are kept."""
        return module.register_forward_pre_hook(self._keep, with_kwargs=True)

    def take(self, module: nn.Module) -> Call:
        """args and kwargs, for use by another module."""
        return self._calls.pop(module)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls[module] = unshared(args, kwargs)


def kept(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """The same with copies of all tensors, in whatever they lie."""
    return tuple(map(_copied, args)), {name: _copied(value) for name, value in kwargs.items()}


def unshared(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """The same, with copies of what a denoiser writes into: caches of keys and values, which are no plain tensors."""
    return tuple(map(_inside, args)), {name: _inside(value) for name, value in kwargs.items()}


def _inside(value: Any) -> Any:
    return value if isinstance(value, Tensor) else _copied(value)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: _copied(one) for name, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return copy.deepcopy(value) if hasattr(value, "__dict__") and not isinstance(value, nn.Module) else value
