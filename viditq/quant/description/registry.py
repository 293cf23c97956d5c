"""Closed tables from a name (as written in yaml and JSON) to the code behind it."""

from collections.abc import Callable
from typing import Generic, TypeVar

from viditq.errors import UserError, close_names

T = TypeVar("T")


class Registry(Generic[T]):
    """Name -> object, filled when viditq is imported and never from a file."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters an object under `name`."""

        def enter(entry: T) -> T:
            assert name not in self._entries, f"two {self.kind}s are called {name}"
            self._entries[name] = entry
            return entry

        return enter

    def get(self, name: object) -> T:
        """The entry called `name`; raises UserError with the known names otherwise."""
        if not isinstance(name, str) or name not in self._entries:
            hint = close_names(str(name), self._entries)
            raise UserError(f"unknown {self.kind} {name!r}; {hint}")
        return self._entries[name]

    def names(self) -> list[str]:
        return sorted(self._entries)


TRANSFORMS: Registry = Registry("transform")
ROUNDINGS: Registry = Registry("rounding")
RANGES: Registry = Registry("range")
BACKENDS: Registry = Registry("backend")
