"""Where a run is, and how long the rest is likely to take."""

import time
from threading import Thread
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from torch.utils.data import DataLoader

from viditq.engine import progress as module
from viditq.engine.progress import (
    BatchCount,
    BatchLines,
    Forecast,
    Progress,
    RunLeft,
    StageBar,
    about,
    callbacks,
    following,
)
from viditq.engine.trainer import Trainer

QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}


class Idle(L.LightningModule):
    def predict_step(self, batch: Any, batch_idx: int) -> int:
        """Nothing to compute."""
        return 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_the_rest_is_what_the_stages_are_known_to_take(clock: list[float]) -> None:
    progress = Progress(["reference", "quantize", "generate", "report"])
    assert progress.left() is None
    progress.begin(1, Forecast({"reference": 10, "generate": 20}, {"quantize": 40.0}, per_prompt=3.0))
    assert progress.left() == 30 + 40 + 60
    clock[0] += 12
    assert progress.left() == 18 + 40 + 60
    progress.begin(3, Forecast({"generate": 20}, {"quantize": 0.0}, per_prompt=3.0))
    clock[0] += 100  # it takes longer than was thought
    assert progress.left() == 0


def test_the_rate_of_the_float_model_tells_of_the_stages_that_sample_too(clock: list[float]) -> None:
    progress = Progress(["reference", "generate"])
    progress.begin(1, Forecast({"reference": 8, "generate": 8}, batch=2))
    clock[0] += 5  # loading
    progress.begin_loop()
    assert progress.left() is None
    clock[0] += 8
    progress.batch(1, 4)  # 2 of 8 prompts in 8 s
    assert progress.left() == pytest.approx(24 + 32)


def test_a_loop_tells_of_a_stage_that_nothing_is_known_of(clock: list[float]) -> None:
    progress = Progress(["evaluate"])
    progress.begin(1, Forecast())
    progress.begin_loop()
    clock[0] += 3
    progress.batch(1, 4)
    assert progress.left() == pytest.approx(9)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        *[(0.0, "about 5 s"), (42, "about 40 s"), (100, "about 2 min"), (3550, "about 59 min")],
        *[(3599, "about 1 h"), (7900, "about 2 h 10 min")],
    ],
)
def test_lengths_of_time(seconds: float, words: str) -> None:
    assert about(seconds) == words


def test_a_loop_tells_its_batches_and_its_bar_is_called_after_the_stage(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[str, float]] = []
    progress = Progress(["prompts", "generate"], listen=lambda p: told.append((p.stage, p.share)))
    with following(progress):
        progress.begin(2, Forecast({"generate": 4}, per_prompt=600.0))
        Trainer(**QUIET).predict(Idle(), DataLoader(torch.arange(4), batch_size=None), return_predictions=False)
    assert told == [("generate", share) for share in (0, 0.25, 0.5, 0.75, 1)]
    assert "generate 2/2" in capsys.readouterr().out
    assert module._PROGRESS.get() is None
    Trainer(**QUIET).predict(Idle(), DataLoader(torch.arange(4), batch_size=None), return_predictions=False)
    assert "Predicting" in capsys.readouterr().out and len(told) == 5


def test_what_is_left_of_the_run_stands_beside_the_bar() -> None:
    """Also in the thread that draws bars, which has another context."""
    task: Any = None  # of the loop, which this column does not speak of
    shown: list[str] = []
    with following(Progress(["generate"])) as progress:
        column = StageBar().configure_columns(Trainer(**QUIET))[-1]
        for forecast in (Forecast(), Forecast({"generate": 4}, per_prompt=600.0)):
            progress.begin(1, forecast)
            thread = Thread(target=lambda: shown.append(column.render(task).plain))
            thread.start()
            thread.join()
    assert isinstance(column, RunLeft) and shown == ["", "run: about 40 min left"]


def test_a_bar_of_ones_own_or_none() -> None:
    kinds = [
        [type(one) for one in callbacks(*given)] for given in (([], True), ([], False), ([TQDMProgressBar()], True))
    ]
    assert kinds == [[BatchCount, StageBar, BatchLines], [BatchCount], [TQDMProgressBar, BatchCount]]


def test_in_a_file_a_line_now_and_then_says_where_a_loop_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bar appears there only when its loop ends."""
    batches, told = DataLoader(torch.zeros(3), batch_size=1), "  generate 1/1: {} of 3 batches; run: about 5 s left"
    for every, expected in ((0.0, [told.format(n) for n in (1, 2, 3)]), (30.0, [])):
        monkeypatch.setattr(module, "LINE_EVERY", every)
        with following(Progress(["generate"])) as progress:
            progress.begin(1, Forecast())
            Trainer(**QUIET).predict(Idle(), batches)
        lines = capsys.readouterr().out.splitlines()
        assert [line.rstrip() for line in lines if line.startswith("  generate")] == expected
