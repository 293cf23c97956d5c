"""Bytes of tensors alive at once, counted operator by operator on any device, the meta device included."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While active, counts the storages that operators create; `peak` is the most that lived at one time.

    What existed before (weights, inputs) is not counted, nor what a kernel allocates for itself while it runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        before = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and _key(leaf) not in before:
                self._add(leaf)
        return out

    def restart(self) -> None:
        """Forget the peak so far; what is alive stays counted."""
        self.peak = self.current

    def _add(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._known:
            return
        nbytes = storage.nbytes()

        def gone(_: Any) -> None:
            if self._known.pop(key, None) is not None:
                self.current -= nbytes

        self._known[key] = weakref.ref(storage, gone)
        self.current += nbytes
        self.peak = max(self.peak, self.current)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class FusedAttention(TorchFunctionMode):
    """On the meta device, attention as the fused kernels do it: its matrix of weights is never formed."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs or {})
            query, value = named["query"], named["value"]
            return torch.empty(*query.shape[:-1], value.shape[-1], dtype=query.dtype, device=query.device)
        return func(*args, **(kwargs or {}))
