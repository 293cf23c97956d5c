"""Fields of descriptions, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from viditq.errors import UserError, close_names


def checked_fields(cls: type, fields: Any, what: str) -> dict[str, Any]:
    """`fields` as keyword arguments of the dataclass `cls`; unknown names raise UserError."""
    if not isinstance(fields, Mapping):
        raise UserError(f"{what} must be a mapping of fields, got {fields!r}")
    allowed = [f.name for f in dataclasses.fields(cls)]
    for name in fields:
        if name not in allowed:
            raise UserError(f"{what} has no field {name!r}; {close_names(str(name), allowed)}")
    return {str(name): value for name, value in fields.items()}


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
