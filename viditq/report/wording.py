"""Numbers and units as the page writes them."""

from collections.abc import Sequence
from math import isfinite

from viditq.report.table import decimals, number

Value = float | int | None


def finite(value: Value) -> float | None:
    """The value, or None where it is missing, nan or infinite."""
    return float(value) if value is not None and isfinite(value) else None


def minus(text: str) -> str:
    """A true minus sign instead of the hyphen."""
    return text.replace("-", "−") if text != "-" else "–"


def plain(value: Value, digits: int, unit: str = "") -> str:
    """`35.50 dB`, or – where there is no value."""
    value = finite(value)
    text = minus(number(value, digits))
    return text if value is None or not unit else f"{text} {unit}"


def signed(value: Value, digits: int, unit: str = "") -> str:
    """`+0.12 dB`; no sign where the digits shown are all zero."""
    value = finite(value)
    if value is None:
        return "–"
    text = number(abs(value), digits)
    sign = "" if not float(text) else "+" if value > 0 else "−"
    return f"{sign}{text} {unit}".rstrip()


def interval(bounds: Sequence[Value] | None, digits: int, sign: bool = False) -> str:
    """`34.5 to 36.6`, or nothing."""
    if bounds is None or any(finite(bound) is None for bound in bounds):
        return ""
    write = signed if sign else plain
    return " to ".join(write(bound, digits) for bound in bounds)


def digits_for(value: Value, *spreads: Value) -> int:
    """Decimals that show two digits of the smallest spread given, or four digits of the value."""
    known = [abs(s) for s in (finite(s) for s in spreads) if s]
    value = finite(value)
    return min(decimals(value if value is not None else 0.0, min(known, default=None)), 6)


def percent(fraction: Value) -> str:
    """`12.3 %` with three significant digits."""
    value = finite(fraction)
    if value is None:
        return "–"
    return f"{minus(f'{100 * value:#.3g}' if abs(value) < 1 else f'{100 * value:.0f}')} %"


def percent_tick(fraction: float) -> str:
    """`15 %`: no digit that says nothing."""
    return f"{three_digits(100 * fraction)} %"


def three_digits(value: float) -> str:
    """Three significant digits without an exponent where that is readable."""
    text = f"{value:.3g}" if not 100 <= abs(value) < 1e6 else f"{value:.0f}"
    return minus(text)


def num_bytes(count: float) -> str:
    """`5.32 MB` (decimal units)."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{three_digits(count / size)} {unit}"
    return f"{count:.0f} bytes"


def seconds(value: float) -> str:
    """`31.4 s`, `12 min 5 s` or `3 h 20 min`."""
    if value < 60:
        return f"{three_digits(value)} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
