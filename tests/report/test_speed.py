"""A step's time in words: against float and bfloat16, emulated or not."""

from typing import Any

import pytest
from page_examples import make_speed

from viditq.report.speed import emulated, emulation, speed_line, speed_numbers, speed_view

EMULATED = "Emulated: the quantized Linears ran in floating point"


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        (None, ""),  # metrics.json of an earlier version
        ({"requested": "fake", "layers": {"fake": 40}}, EMULATED),
        ({"requested": "auto", "layers": {"fake": 40}}, EMULATED),
        ({"requested": "fake", "layers": None}, EMULATED),
        ({"requested": "auto", "layers": None}, ""),
        ({"requested": "native", "layers": {"native": 40}}, ""),
        ({"requested": "auto", "layers": {"fake": 4, "native": 30, "portable": 6}}, "Emulated in part: 4 of 40"),
        ({"requested": "fake", "layers": {}}, ""),  # nothing is quantized
    ],
)
def test_emulation_is_told(backend: dict[str, Any] | None, words: str) -> None:
    sentence = emulation(backend)
    assert sentence.startswith(words) and bool(sentence) == bool(words)
    assert sentence.lower().startswith(emulated(backend)) and bool(emulated(backend)) == bool(words)


def test_the_line_of_the_headline() -> None:
    assert speed_line(None, None) == ""
    ran = {"requested": "auto", "layers": {"native": 40}}
    assert speed_line(ran, make_speed()) == (
        "A step of the denoiser takes 30 ms, 3 times the speed of float32 and 2 times the speed of bfloat16; "
        "its weights hold 10 MB of memory, those of float 40 MB."
    )
    line = speed_line({"requested": "fake", "layers": {"fake": 40}}, make_speed({"fake": 40}))
    assert line.startswith(EMULATED) and "A step of the denoiser takes 30 ms" in line


def test_what_the_run_compiles_is_set_against_what_it_compiles() -> None:
    """bfloat16 in eager mode is no rival of a compiled run."""
    line = speed_line(None, make_speed(compiled=True))
    assert "takes 27 ms, 3 times the speed of float32 and 2 times the speed of bfloat16" in line
    view = speed_view(make_speed(compiled=True))
    assert [bar.label for bar in view.bars][-2:] == ["quantized (native)", "quantized (native), compiled"]
    assert [bar.time for bar in view.bars] == ["90 ms", "81 ms", "60 ms", "54 ms", "30 ms", "27 ms"]
    assert view.bars[0].share == 100 and view.bars[-1].share == 30


def test_only_a_dtype_of_its_own_makes_a_row() -> None:
    """A model in bfloat16 has no other bfloat16 to be set against."""
    speed = make_speed()
    del speed["candidates"]["bfloat16"]
    speed["candidates"]["float"]["dtype"] = "bfloat16"
    assert "3 times the speed of bfloat16; its weights" in speed_line(None, speed)
    assert [bar.label for bar in speed_view(speed).bars] == ["bfloat16", "quantized (native)"]


def test_numbers_for_loggers() -> None:
    numbers = speed_numbers(make_speed())
    assert numbers["quantized/median"] == 0.03 and numbers["float/weights_bytes"] == 40_000_000
    assert not any(key.endswith("step_bytes") for key in numbers)  # the system told none
