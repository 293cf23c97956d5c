"""The table at the end of a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, isfinite, log10

from rich import box
from rich.table import Table


@dataclass(frozen=True)
class MetricRow:
    """One line: `standard_error` and `reference_value` are None or nan where there is none."""

    name: str
    value: float
    standard_error: float | None = None
    reference_value: float | None = None
    higher_is_better: bool | None = None
    unit: str = ""


def metrics_table(rows: Sequence[MetricRow], title: str | None = None) -> Table:
    """A rich table for `Console().print`: name, value and error, the float model's value, better direction.

    The float column appears only if some metric has such a value.
    """
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD)
    with_reference = any(_known(row.reference_value) for row in rows)
    table.add_column("metric", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    if with_reference:
        table.add_column("float model", justify="right", no_wrap=True)
    table.add_column("better", no_wrap=True)
    for row in rows:
        digits = decimals(row.value, row.standard_error)
        value = f"{value_and_error(row.value, row.standard_error)} {row.unit}".rstrip()
        reference = [number(row.reference_value, digits)] if with_reference else []
        better = {True: "higher", False: "lower", None: "-"}[row.higher_is_better]
        table.add_row(row.name, value, *reference, better)
    return table


def value_and_error(value: float, standard_error: float | None = None) -> str:
    """`38.02 ± 0.31`: the error with two significant digits, the value to the same decimal."""
    digits = decimals(value, standard_error)
    text = number(value, digits)
    return f"{text} ± {number(standard_error, digits)}" if _known(standard_error) else text


def decimals(value: float, standard_error: float | None = None) -> int:
    """Decimals for two significant digits of the error, or for four of the value where there is no error."""
    leading, significant = (standard_error, 2) if _known(standard_error) and standard_error else (value, 4)
    if not _known(leading) or not leading:
        return 2
    return min(max(significant - 1 - floor(log10(abs(leading))), 0), 8)


def number(value: float | None, digits: int) -> str:
    """A number with `digits` decimals, or - where there is none."""
    return f"{value:.{digits}f}" if value is not None and isfinite(value) else "-"


def _known(value: float | None) -> bool:
    return value is not None and isfinite(value)
