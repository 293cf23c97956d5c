"""The seconds that stages took, and what they were measured on, in two files beside what they made.

Both only tell: what is there and holds something else fails no run, and counts as not recorded.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from viditq.files import is_whole, read_json, write_json
from viditq.report.stage_seconds import UNKNOWN

SECONDS, CONDITIONS = "seconds.json", "seconds_on.json"
LONGEST = 1e9  # seconds, thirty years: more is no time that a stage took


@contextmanager
def timed(folder: Path, stage: str, on: Callable[[], str] | None = None) -> Iterator[None]:
    """Add the seconds of the enclosed work to <folder>/seconds.json (an interrupted stage counts what it got to).

    on: what it was computed on, in words, asked at its end; kept beside the seconds, in the order of the parts.
    """
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds, conditions = read_seconds(folder), read_conditions(folder)
        before = conditions.get(stage, [UNKNOWN] * (stage in seconds))
        seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - start, 2)
        write_json(folder / SECONDS, seconds)
        if on is not None:
            write_json(folder / CONDITIONS, {**conditions, stage: list(dict.fromkeys([*before, on()]))})


def read_seconds(folder: Path) -> dict[str, float]:
    """Stage -> seconds, as recorded in `folder`. Raises UserError where the file was cut off."""
    file = folder / SECONDS
    return plausible_seconds(read_json(file)) if file.is_file() else {}


def plausible_seconds(found: Any) -> dict[str, float]:
    """Those of the values that can be seconds of stages."""
    given = found.items() if isinstance(found, dict) else ()
    return {stage: value for stage, value in given if type(value) in (int, float) and 0 <= value < LONGEST}


def read_conditions(folder: Path) -> dict[str, list[str]]:
    """Stage -> what its seconds were measured on, in words, several where that changed; empty where it is not known."""
    file = folder / CONDITIONS
    found = read_json(file) if is_whole(file) else {}
    given = found.items() if isinstance(found, dict) else ()
    return {stage: on for stage, on in given if isinstance(on, list) and all(isinstance(word, str) for word in on)}
