"""What is left of a run, on durations recorded on a quiet machine and on one that gave a run a fifth of its time."""

import time
from collections.abc import Iterator

import pytest

from viditq.engine.pace import EARLIER, Forecast, Loops
from viditq.engine.progress import Progress

# tiny_image, 128 prompts in batches of 8, W4A8: stage -> seconds before its loops, the loops as batches and seconds,
# and seconds after them.
Stages = dict[str, tuple[float, list[tuple[int, float]], float]]
QUIET: Stages = {
    "reference": (0.08, [(16, 3.43)], 0.02),
    "noise_floor": (0.02, [(4, 0.81), (4, 0.58), (4, 0.9)], 0.02),
    "quantize": (0.09, [], 0.0),
    "generate": (0.07, [(16, 1.36)], 0.02),
    "diagnose": (0.15, [(1, 0.28)], 0.08),
    "benchmark": (0.63, [], 0.0),
    "evaluate": (0.05, [(8, 0.45), (2, 0.07), (2, 0.15), (2, 0.14), (2, 0.05)], 0.1),
    "report": (0.46, [], 0.0),
}
BUSY: Stages = {
    "reference": (0.4, [(16, 18.3)], 0.15),
    "noise_floor": (0.1, [(4, 4.3), (4, 3.4), (4, 4.8)], 0.6),
    "quantize": (0.5, [], 0.0),
    "generate": (0.4, [(16, 7.9)], 0.13),
    "diagnose": (0.8, [(1, 2.4)], 0.4),
    "benchmark": (3.5, [], 0.0),
    "evaluate": (0.3, [(8, 2.2), (2, 0.35), (2, 0.75), (2, 0.7), (2, 0.25)], 0.08),
    "report": (2.26, [], 0.0),
}
PROMPTS = {"reference": 128.0, "noise_floor": 96.0, "generate": 128.0, "diagnose": 8.0}


def took(stages: Stages, name: str) -> float:
    before, loops, after = stages[name]
    return before + sum(seconds for _, seconds in loops) + after


def told(
    run: Stages, earlier: Stages, monkeypatch: pytest.MonkeyPatch, made: bool = False
) -> Iterator[tuple[str, int, float, float]]:
    """Stage, batches of the run so far, seconds that are truly left and those that are said. made: the float samples
    are there, and were made as those of `earlier` were.
    """
    now, batches = 1000.0, 0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    names = [name for name in run if not (made and name in ("reference", "noise_floor"))]
    end, progress = now + sum(took(run, name) for name in names), Progress(names)
    earlier_seconds = {n: took(earlier, n) for n in ("quantize", "generate", "benchmark", "evaluate", "report")}
    unit = before_us = took(earlier, "reference") / 128
    for number, name in enumerate(names, 1):
        done = dict.fromkeys(names[: number - 1], 0.0)
        if name == "noise_floor":
            unit = took(run, "reference") / 128  # as the run has recorded it by now
        prompts = {stage: 0.0 if stage in done else count for stage, count in PROMPTS.items()}
        progress.begin(number, Forecast(prompts, {**earlier_seconds, **done}, unit, before_us, batch=8))
        yield name, batches, end - now, progress.left() or 0.0
        before, loops, after = run[name]
        now += before
        for count, seconds in loops:
            progress.begin_loop()
            for batch in range(count):
                now += seconds / count
                batches += 1
                progress.batch(batch + 1, count)
                yield name, batches, end - now, progress.left() or 0.0
        now += after


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize(("run", "earlier"), [(QUIET, BUSY), (BUSY, QUIET), (QUIET, QUIET)])
def test_what_is_left_follows_the_run_once_it_has_done_something(
    run: Stages, earlier: Stages, made: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier runs took five times as long, or a fifth."""
    for name, batches, truth, said in told(run, earlier, monkeypatch, made):
        if batches > 1:
            assert truth / 1.7 - 1 <= said <= 1.7 * truth + 1, (name, batches, truth, said)


def test_before_that_it_is_what_earlier_runs_took(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, _, said = next(told(QUIET, BUSY, monkeypatch))
    floors_and_diagnosis = 104 * took(BUSY, "reference") / 128
    stages = ("reference", "quantize", "generate", "benchmark", "evaluate", "report")
    assert said == pytest.approx(sum(took(BUSY, name) for name in stages) + floors_and_diagnosis)


def test_a_stage_that_another_run_has_done_says_nothing_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(["reference", "evaluate"])
    progress.begin(1, Forecast({"reference": 100}, {"evaluate": 50.0}, per_prompt=3.0, earlier=3.0))
    now[0] += 40  # it was waited for
    progress.begin(2, Forecast({"reference": 0}, {"evaluate": 50.0}, per_prompt=3.0))
    assert progress.left() == 50.0


def test_samples_that_are_there_may_be_of_another_pace_than_earlier_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(["reference", "evaluate"])
    progress.begin(1, Forecast({"reference": 100}, {"evaluate": 500.0}, per_prompt=0.1, earlier=1.0, batch=50))
    progress.begin_loop()
    now[0] += 5.0
    progress.batch(1, 2)
    assert progress.left() == pytest.approx(5 + 500 * (10 + EARLIER) / (100 + EARLIER))


def test_batches_that_lack_a_few_samples_alone_are_all_still_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of eight is missing in each of ten batches: ten samples are two batches, and the loop has ten."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(["reference"])
    progress.begin(1, Forecast({"reference": 10}, batch=8))
    progress.begin_loop()
    for done in (1, 2):
        now[0] += 3.0
        progress.batch(done, 10)
    assert progress.left() == 24.0


def test_a_slow_first_batch_is_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    loops = Loops()
    assert loops.left() is None
    loops.begin()
    for done, at in ((1, 30.0), (2, 31.0), (3, 32.0)):
        now[0] = at
        loops.batch(done, 10)
    assert loops.left() == 7.0
    now[0] += 0.5  # while a batch is at work
    assert loops.left() == 6.5


def test_batches_that_end_together_count_as_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two side by side, 3 s a round but 4 for the first: 1.5 s a batch, whichever of the two has been told of."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    loops = Loops()
    loops.begin(2)
    found = []
    for done, now[0] in enumerate([4.0, 4.0, 7.0, 7.0, 10.0, 10.0], 1):
        loops.batch(done, 8)
        found.append(loops.each)
    assert found == [2.0, 2.0, 1.5, 1.5, 1.5, 1.5]
    assert loops.left() == 3.0
