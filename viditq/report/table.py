"""The table at the end of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, isfinite, log10
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

DIRECTIONS = {True: "↑", False: "↓", None: "="}
LEGEND = (
    "↑ higher is better, ↓ lower, = as near to float as can be; float: its own value;\n"
    "noise floors: float with another seed, in bf16, nudged (next to no noise on latents)"
)
STYLES = {"worse": "bold red", "differs": "yellow", "better": "bold green", "equal within noise": "dim"}
SHORT = {"bfloat16": "bf16", "latents": "nudge"}


@dataclass(frozen=True)
class MetricRow:
    """One line: `standard_error` and `reference_value` are None or nan where there is none."""

    name: str
    value: float | None
    standard_error: float | None = None
    reference_value: float | None = None
    higher_is_better: bool | None = None
    unit: str = ""


def metrics_table(rows: Sequence[MetricRow], title: str | None = None) -> Table:
    """Name, value and error, the float model's value, better direction: what is known without verdicts.

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


def verdict_table(
    verdicts: Mapping[str, Mapping[str, Any]], labels: Mapping[str, Mapping[str, Any]], title: str | None = None
) -> Table:
    """One metric per row: the quantized model's value, its difference, the verdict, and what the float model has.

    `verdicts` and `labels` as in metrics.json. Intervals (95 %) stand below their numbers, and a star marks a metric
    whose entry holds a warning. Fits 80 columns.
    """
    table = Table(
        title=title, caption=LEGEND, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0)
    )
    table.title_justify = table.caption_justify = "left"
    table.header_style = "bold"
    table.add_column("metric", overflow="fold", min_width=16)
    table.add_column("value\n95 % interval", justify="right", no_wrap=True)
    table.add_column("difference\n95 % interval", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("float model", no_wrap=True)
    for name, entry in verdicts.items():
        table.add_row(*_cells(entry, labels[name]))
        if entry.get("on_floor_prompts"):
            table.add_row(*_of_first(entry))
    return table


def _cells(entry: Mapping[str, Any], label: Mapping[str, Any]) -> list[Text]:
    unit = f", {label['unit']}" if label["unit"] else ""
    star = "*" if entry["warning"] else ""
    against = f" vs {SHORT.get(entry['against'], entry['against'])}" if entry["against"] else ""
    return [
        Text(f"{DIRECTIONS[label['higher_is_better']]} {label['label']}{unit}{star}"),
        _with_interval(entry["value"], entry["interval"]),
        _with_interval(entry["difference"], entry["difference_interval"], "+", against),
        _verdict(entry),
        _float_model({"float": entry["float"], "floors": {}} if entry.get("on_floor_prompts") else entry),
    ]


def _of_first(entry: Mapping[str, Any]) -> list[Text]:
    """A distance of all prompts has no place beside floors of fewer: the same of those."""
    first = entry["on_floor_prompts"]
    of = {"float": first["float"], "floors": entry["floors"]}
    value = Text(number(first["value"], decimals(first["value"])))
    return [Text(f"  of the first {first['num_prompts']}", "dim"), value, Text(), Text(), _float_model(of)]


def _with_interval(value: float | None, interval: Sequence[float] | None, sign: str = "", suffix: str = "") -> Text:
    """The interval's half width has two significant digits, unless it is next to nothing."""
    if interval is None:
        return Text(number(value, decimals(value), sign) + suffix)
    half = (interval[1] - interval[0]) / 2
    digits = decimals(value, half if half > 1e-6 * abs(value or 0) else None)
    below = " to ".join(number(bound, digits) for bound in interval)
    return Text(number(value, digits, sign) + suffix).append(f"\n{below}", "dim")


def _verdict(entry: Mapping[str, Any]) -> Text:
    if entry["difference_interval"] is None:
        return Text("not told", "magenta")
    return Text(entry["verdict"].split()[0], STYLES[entry["verdict"]])


def _float_model(entry: Mapping[str, Any]) -> Text:
    """The float model's own value and the noise floors, each on a line."""
    values = {"float": entry["float"]} if entry["float"] is not None else {}
    lines = [f"{SHORT.get(k, k):<5} {short(v)}" for k, v in {**values, **entry["floors"]}.items() if v is not None]
    return Text("\n".join(lines) or "-")


def short(value: float | None) -> str:
    """A number in at most four significant digits and few characters, - where there is none."""
    if value is not None and 0 < abs(value) < 1e-3:
        return f"{value:.1e}"
    return number(value, min(decimals(value), 4))


def value_and_error(value: float | None, standard_error: float | None = None) -> str:
    """`38.02 ± 0.31`: the error with two significant digits, the value to the same decimal."""
    digits = decimals(value, standard_error)
    text = number(value, digits)
    return f"{text} ± {number(standard_error, digits)}" if _known(standard_error) else text


def decimals(value: float | None, standard_error: float | None = None) -> int:
    """Decimals for two significant digits of the error, or for four of the value where there is no error."""
    leading, significant = (standard_error, 2) if _known(standard_error) and standard_error else (value, 4)
    if leading is None or not _known(leading) or not leading:
        return 2
    return min(max(significant - 1 - floor(log10(abs(leading))), 0), 8)


def number(value: float | None, digits: int, sign: str = "") -> str:
    """A number with `digits` decimals (`sign` "+": always with its sign), or - where there is none."""
    return f"{value:{sign}.{digits}f}" if value is not None and isfinite(value) else "-"


def _known(value: float | None) -> bool:
    return value is not None and isfinite(value)
