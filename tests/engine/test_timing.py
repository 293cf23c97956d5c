"""Interleaved timing with a clock that the test turns, and memory that a piece of work takes."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from viditq.engine import timing
from viditq.engine.timing import interleaved, peak_bytes, rounds_within, spread


class Clock:
    """Stands still unless it is told to go on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: Callable[[int], float]) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds(self.order.count(name))
            self.order.append(name)

        return run


def test_every_round_runs_all_candidates_once_in_another_order() -> None:
    clock = Clock()
    candidates = {
        name: clock.work(name, lambda turn, factor=factor: factor * (turn + 1))
        for name, factor in (("a", 1.0), ("b", 10.0), ("c", 100.0))
    }
    seconds = interleaved(candidates, 6, random.Random(0), clock)
    rounds = [clock.order[i : i + 3] for i in range(0, 18, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds) and len({tuple(r) for r in rounds}) > 2
    assert seconds["a"] == pytest.approx([1, 2, 3, 4, 5, 6])
    assert seconds["c"] == pytest.approx([100, 200, 300, 400, 500, 600])


def test_the_spread_is_the_median_and_the_outer_tenths() -> None:
    assert spread([float(i) for i in range(11)]) == {"median": 5.0, "low": 1.0, "high": 9.0}
    assert spread([3.0, 3.0, 3.0, 3.0, 90.0])["median"] == 3.0


@pytest.mark.parametrize(
    ("seconds", "each", "rounds"),
    [(10.0, 2.0, 5), (10.0, 1.5, 6), (10.0, 0.1, 10), (0.0, 3.0, 5), (None, 3.0, 10), (9.0, 0.0, 10), (-4.0, 1.0, 5)],
)
def test_rounds_are_as_many_as_fit(seconds: float | None, each: float, rounds: int) -> None:
    assert rounds_within(seconds, each, 10) == rounds


@pytest.mark.skipif(not timing.CLEAR.exists(), reason="the peak of the resident set is Linux's")
def test_the_peak_is_that_of_the_work_alone() -> None:
    def work() -> None:
        x = torch.ones(8_000_000)  # 32 MB
        del x
        torch.ones(1_000_000)

    before = torch.ones(10_000_000)
    found = [peak_bytes(work, torch.device("cpu")) for _ in range(3)]
    # What else the process holds may shrink meanwhile and hide some of it: seen once in thousands of times.
    assert (
        all(peak is not None and peak < 45e6 for peak in found)
        and max(peak or 0 for peak in found) > 30e6
        and before[0] == 1
    )


def test_without_the_system_s_figures_nothing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(timing, "STATUS", tmp_path / "none")
    monkeypatch.setattr(timing, "CLEAR", tmp_path / "clear")
    assert peak_bytes(lambda: None, torch.device("cpu")) is None
