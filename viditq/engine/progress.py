"""Where a run is: told at each stage and batch, shown beside the bar, handed on to whoever listens."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task
from rich.table import Column
from rich.text import Text

from viditq.engine.pace import Forecast, Pace

BAR_WIDTH = 12  # of 80 characters, as there is more to say
LINE_EVERY = 30.0  # seconds, where bars are not drawn: in a file or a pipe


class Progress:
    """The stage that a run is at, and how far it is in it. listen: called at each change with this object."""

    def __init__(self, stages: Sequence[str], listen: Callable[["Progress"], None] | None = None) -> None:
        self.stages, self.listen = tuple(stages), listen
        self.number, self.share = 0, 0.0
        self._pace = Pace()

    @property
    def stage(self) -> str:
        """Its name; empty before the first."""
        return self.stages[self.number - 1] if self.number else ""

    @property
    def described(self) -> str:
        return f"{self.stage} {self.number}/{len(self.stages)}" if self.number else ""

    def begin(self, number: int, forecast: Forecast) -> None:
        """A stage, counted from 1, and what is known of it and the later ones."""
        self.number, self.share = number, 0.0
        self._pace.begin(self.stage, forecast)
        self._tell()

    def begin_loop(self, at_once: int = 1) -> None:
        """One of the stage's loops over batches, of which so many are made side by side."""
        self.share = 0.0
        self._pace.loops.begin(at_once)

    def batch(self, done: int, total: int) -> None:
        """So many of the batches of a loop are done."""
        self.share = done / total
        self._pace.loops.batch(done, total)
        self._tell()

    def left(self) -> float | None:
        """Seconds that the rest of the run is likely to take, as far as its stages are known; None = none is."""
        found = [self._pace.left(), *(self._pace.of(stage) for stage in self.stages[self.number :])]
        known = [seconds for seconds in found if seconds is not None]
        return sum(known) if known else None

    def _tell(self) -> None:
        if self.listen is not None:
            self.listen(self)


_PROGRESS: ContextVar[Progress | None] = ContextVar("progress", default=None)


@contextmanager
def following(progress: Progress) -> Iterator[Progress]:
    """While the block lasts, the loops of this process tell `progress` of their batches."""
    token = _PROGRESS.set(progress)
    try:
        yield progress
    finally:
        _PROGRESS.reset(token)


def about(seconds: float) -> str:
    """A length of time as one says it: `about 40 s`, `about 3 min`, `about 2 h 10 min`."""
    if seconds < 60:
        return f"about {max(round(seconds / 5) * 5, 5)} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"about {minutes} min"
    hours, minutes = divmod(round(minutes, -1), 60)
    return f"about {hours} h" + f" {minutes} min" * bool(minutes)


class RunLeft(ProgressColumn):
    """What is left of the whole run, beside the bar of one of its loops.

    progress: of the run, taken where the loop begins: bars are drawn by a thread of their own, with another context.
    """

    max_refresh = 1.0

    def __init__(self, progress: Progress | None) -> None:
        super().__init__()
        self.progress = progress

    def get_table_column(self) -> Column:
        """One line, whatever the width of the terminal."""
        return Column(no_wrap=True)

    def render(self, task: Task) -> Text:
        """Nothing where nothing is known."""
        left = self.progress.left() if self.progress else None
        return Text("" if left is None else f"run: {about(left)} left")


class StageBar(RichProgressBar):
    """Lightning's bar under the name of the stage, with what is left of the run."""

    @property
    def predict_description(self) -> str:
        progress = _PROGRESS.get()
        return (progress and progress.described) or super().predict_description

    @property
    def test_description(self) -> str:
        progress = _PROGRESS.get()
        return (progress and progress.described) or super().test_description

    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        """Without the rate: the batches of stages are not alike."""
        description, bar, batches, times, _ = super().configure_columns(trainer)
        if isinstance(bar, BarColumn):
            bar.bar_width = BAR_WIDTH
        return [description, bar, batches, times, RunLeft(_PROGRESS.get())]


class BatchCount(L.Callback):
    """Tells the run's progress of each batch; also where no bar is shown."""

    def on_predict_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._begin(getattr(trainer.predict_dataloaders, "workers", 1))

    def on_test_start(self, *args: Any) -> None:
        self._begin()

    def on_predict_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._count(trainer.num_predict_batches, batch_idx)

    def on_test_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._count(trainer.num_test_batches, batch_idx)

    def _begin(self, at_once: int = 1) -> None:
        if progress := _PROGRESS.get():
            progress.begin_loop(at_once)

    def _count(self, totals: Sequence[int | float], index: int) -> None:
        if progress := _PROGRESS.get():
            progress.batch(index + 1, int(sum(totals)))


class BatchLines(L.Callback):
    """Where a bar would only appear when its stage ends: a line now and then, with what is left of the run."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def on_predict_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._tell(trainer, trainer.num_predict_batches, batch_idx)

    def on_test_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._tell(trainer, trainer.num_test_batches, batch_idx)

    def _tell(self, trainer: L.Trainer, totals: Sequence[int | float], index: int) -> None:
        progress, now = _PROGRESS.get(), time.monotonic()
        if progress is None or not trainer.is_global_zero or now - self._told < LINE_EVERY:
            return
        self._told, left = now, progress.left()
        rest = "" if left is None else f"; run: {about(left)} left"
        print(f"  {progress.described}: {index + 1} of {int(sum(totals))} batches{rest}", flush=True)


def callbacks(given: Sequence[L.Callback], bar: bool) -> list[L.Callback]:
    """Those of a trainer: the given ones and ours. bar: whether one is to be shown, where none is given."""
    shown = bar and not any(isinstance(callback, ProgressBar) for callback in given)
    lines = [] if Console().is_terminal else [BatchLines()]
    return [*given, BatchCount(), *([StageBar(), *lines] if shown else [])]
