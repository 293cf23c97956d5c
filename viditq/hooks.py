"""Hooks of modules that are copied and pickled with their module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.hooks import RemovableHandle


class Hook:
    """Calls `function`: a bound method or a partial of one, whose object is copied and pickled with the module.

    A function defined inside another is shared by a module and its copies, and cannot be pickled.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.number = function, -1

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch counts hooks by process: the next one would take the number, and the place, of one from a file
        self.__dict__.update(state)
        RemovableHandle.next_id = max(RemovableHandle.next_id, self.number + 1)


def add_hook(register: Callable[..., RemovableHandle], function: Callable[..., Any], **how: Any) -> RemovableHandle:
    """`register(function, **how)` as a Hook; register: such as `module.register_forward_hook`."""
    hook = Hook(function)
    handle = register(hook, **how)
    hook.number = handle.id
    return handle
