"""The table's numbers, and its plain form where there is no terminal."""

import io
from math import nan

import pytest
from rich.console import Console

from viditq.report.table import MetricRow, metrics_table, value_and_error

ROWS = [
    MetricRow("PSNR", 38.0234, 0.312, higher_is_better=True, unit="dB"),
    MetricRow("FVD to data (moving-shapes features)", 12.3456, nan, 11.2, higher_is_better=False),
]


def printed(rows: list[MetricRow], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(metrics_table(rows, "64 pairs"))
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (38.0234, 0.312, "38.02 ± 0.31"),
        (0.98012, 0.00123, "0.9801 ± 0.0012"),
        (12345.6, 123.4, "12346 ± 123"),
        (-1.5, 2.0, "-1.5 ± 2.0"),
        (12.3456, nan, "12.35"),
        (0.000123456, None, "0.0001235"),
        (100.0, 0.0, "100.0 ± 0.0"),
        (0.0, None, "0.00"),
        (nan, nan, "-"),
    ],
)
def test_digits_follow_the_error(value, error, text):
    assert value_and_error(value, error) == text


def test_plain_text_without_a_terminal():
    assert max(map(len, printed(ROWS, width=80).splitlines())) <= 80
    text = printed(ROWS, width=100)
    assert "\x1b" not in text
    psnr, fvd = (next(line for line in text.splitlines() if row.name in line) for row in ROWS)
    assert psnr.split() == ["PSNR", "38.02", "±", "0.31", "dB", "-", "higher"]
    assert fvd.split()[-3:] == ["12.35", "11.20", "lower"]


def test_the_float_column_comes_with_a_float_value_and_narrow_screens_cut_nothing():
    assert "float model" in printed(ROWS) and "float model" not in printed(ROWS[:1])
    assert "…" not in printed(ROWS, width=60)
