"""The table's numbers, and its plain form where there is no terminal."""

import io
from math import nan

import pytest
from rich.console import Console

from viditq.report.table import MetricRow, metrics_table, short, value_and_error, verdict_table

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


LONG = "FVD to data (moving-shapes features)"
LABELS = {
    "psnr": {"label": "PSNR", "unit": "dB", "higher_is_better": True},
    "clip": {"label": "CLIPSIM (moving-shapes CLIP)", "unit": "", "higher_is_better": True},
    "motion": {"label": "motion magnitude", "unit": "px", "higher_is_better": None},
    "flicker": {"label": "flicker", "unit": "", "higher_is_better": False},
    "fvd": {"label": LONG, "unit": "", "higher_is_better": False},
    "ssim": {"label": "SSIM", "unit": "", "higher_is_better": True},
}


def entry(verdict, value, interval, difference, difference_interval, against, floors, float_=None, warning=None):
    return {
        "verdict": verdict,
        "value": value,
        "interval": interval,
        "float": float_,
        "against": against,
        "difference": difference,
        "difference_interval": difference_interval,
        "floors": dict(zip(("seed", "bfloat16"), floors, strict=True)),
        "warning": warning,
    }


EQUAL = "equal within noise"
VERDICTS = {
    "psnr": entry("differs", 35.4988, [34.42, 36.56], -22.51, [-23.98, -21.01], "bfloat16", (17.271, 60.052)),
    "clip": entry(EQUAL, 91.026, [89.65, 92.17], -0.0862, [-0.81, 0.54], "float", (91.43, 91.75), 91.11),
    "flicker": entry("worse", 0.5, [0.4, 0.6], 0.2, [0.1, 0.3], "float", (0.3, 0.3), 0.3),
    "motion": entry("better", 1.71, [1.48, 1.96], 0.73, [0.64, 0.83], "float", (2.77, None), 2.44),
    "fvd": entry(EQUAL, 31782.4, [25598.1, 38042.2], 2.24, [-0.5, 3.8], "float", (4e-4, 44.1), 34.0, "few samples"),
    "ssim": entry(EQUAL, None, None, None, None, None, (None, None), warning="nothing can be told"),
}


def printed_verdicts(width: int, color: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=color, color_system="standard" if color else None)
    console.print(verdict_table(VERDICTS, LABELS, "128 pairs"))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 100])
def test_verdicts_fit_and_nothing_is_cut(width):
    text = printed_verdicts(width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text and "\x1b" not in text
    for part in (
        "35.5",
        "34.4 to 36.6",
        "-22.5 vs bf16",
        "-24.0 to -21.0",
        "25598 to 38042",
        "seed  4.0e-04",
        "not told",
    ):
        assert part in text
    for label in LABELS.values():
        for word in label["label"].split():
            assert word in text


def test_each_line_says_what_belongs_together():
    lines = printed_verdicts(100).splitlines()
    psnr = next(i for i, line in enumerate(lines) if "PSNR" in line)
    assert lines[psnr].split() == ["↑", "PSNR,", "dB", "35.5", "-22.5", "vs", "bf16", "differs", "seed", "17.27"]
    assert lines[psnr + 1].split() == ["34.4", "to", "36.6", "-24.0", "to", "-21.0", "bf16", "60.05"]
    clip = next(i for i, line in enumerate(lines) if "CLIPSIM" in line)
    assert lines[clip].split()[-7:] == ["91.0", "-0.09", "vs", "float", "equal", "float", "91.11"]
    assert next(line for line in lines if "motion" in line).split()[:3] == ["=", "motion", "magnitude,"]
    assert next(line for line in lines if "SSIM" in line).split() == ["↑", "SSIM*", "-", "-", "not", "told", "-"]


def test_words_carry_the_verdict_and_colours_repeat_it():
    colored = printed_verdicts(100, color=True)
    for word, code in (("differs", "33"), ("worse", "1;31"), ("better", "1;32"), ("equal", "2"), ("not told", "35")):
        assert f"\x1b[{code}m{word}" in colored


@pytest.mark.parametrize(
    ("value", "text"), [(60.052, "60.05"), (0.99951, "0.9995"), (0.003469, "0.0035"), (4e-4, "4.0e-04"), (None, "-")]
)
def test_short_numbers(value, text):
    assert short(value) == text
