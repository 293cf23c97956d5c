"""A search beside every other run of no fewer bytes, on runs written here."""

from collections.abc import Callable
from pathlib import Path

import pytest

from viditq.errors import UserError
from viditq.sweeps.equal_bytes import equal_bytes

Write = Callable[..., Path]


def searched(name: str) -> bool:
    return name.startswith("best")


def tables(text: str) -> list[dict[str, list[str]]]:
    """Of each table, first cell -> the others; without headings."""
    found = []
    for part in text.split("### ")[1:]:
        lines = [line for line in part.splitlines() if line.startswith("| ")][1:]
        cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
        found.append({first: rest for first, *rest in cells})
    return found


def test_both_ways(write: Write, tmp_path: Path) -> None:
    write("best_small", 40, 2.0)
    write("best_large", 60, 4.0, ratio=1.5)
    write("worse", 38, 2.03, ratio=2.0, backend="fake")  # within what a budget is filled to
    write("better", 43, 2.1)
    write("unclear", 60.2, 4.5, noise=6.0)
    write("small", 30, 1.9)
    write("weights", 41, 1.95, activation_bits=16.0)  # activations in float: the search had to quantize its own
    text = equal_bytes([str(tmp_path / "runs")], searched)
    cells, every = tables(text)
    assert cells["best_small"][3] == "worse" and cells["best_small"][-1].startswith("+2.0")
    assert cells["best_large"][3] == "better" and cells["best_large"][-1].startswith("+17")
    taken = {name: (rest[-5], rest[-1][:4]) for name, rest in every.items()}
    assert taken == {
        **{"best_small": ("-", "-"), "best_large": ("-", "-"), "small": ("-", "-"), "weights": ("-", "-")},
        **{"worse": ("best_small", "+2.0"), "better": ("best_small", "-3.0"), "unclear": ("best_large", "-0.2")},
    }
    assert every["worse"][3:5] == ["1.00", "2.00, emulated"] and every["better"][3:5] == ["not measured"] * 2
    assert "Of 3 others" in text and "better than 1 and certainly worse than 1; 1 are not told apart" in text


def test_where_lower_is_better(write: Write, tmp_path: Path) -> None:
    for name, error, megabytes in (("best", 0.1, 2.0), ("plain", 0.3, 2.1)):
        folder = write(name, error, megabytes)
        metrics = folder / "metrics.json"
        metrics.write_text(metrics.read_text().replace('"higher_is_better": true', '"higher_is_better": false'))
    text = equal_bytes([str(tmp_path / "runs")], searched)
    assert "better than 1 and certainly worse than 0" in text


def test_without_a_search_there_is_nothing_to_tell(write: Write, tmp_path: Path) -> None:
    write("plain", 40, 2.0)
    with pytest.raises(UserError, match="None of these runs is a search's"):
        equal_bytes([str(tmp_path / "runs")], searched)
