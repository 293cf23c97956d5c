"""Numbers of bytes as users write them, and as they are told."""

import re

from viditq.errors import UserError

UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def num_bytes(value: int | str | None, key: str = "") -> int | None:
    """A number of bytes, or a number with a unit: "600MB", "1.5 GB", "2GiB"; key: such as "fit=", for the message.

    Raises UserError for anything else.
    """
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(B|kB|MB|GB|TB|KiB|MiB|GiB|TiB)?\s*", str(value), re.IGNORECASE)
    if found is None or isinstance(value, bool) or float(found[1]) == 0:
        raise UserError(f"{key}{value!r} is no number of bytes: give such as 800_000_000, 800MB or 1.5GB.")
    unit = (found[2] or "B").lower()
    base = 1024 if "i" in unit else 1000
    return int(float(found[1]) * base ** "bkmgt".index(unit[0]))


def rounded(value: int, up: bool = False) -> str:
    """Three digits and a unit, as `num_bytes` reads them, never more than `value`, or (up) never less."""
    for unit, name in UNITS:
        if value >= unit:
            step = 10 ** max(len(str(int(value))) - 3, 0)
            number = (-(-value // step) if up else value // step) * step
            return f"{number / unit:g}{name}"
    return f"{value}B"
