"""What is left of a run: by its own pace where it has done something, else by what earlier runs took."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

EARLIER = 1.0  # seconds for which earlier runs are believed against what this one has done
FURTHEST = 20.0  # this run is taken for at most so many times as fast, or as slow, as earlier ones
BY_BATCHES = ("reference", "noise_floor", "generate")  # stages whose batches are of `Forecast.batch` prompts
OF_FLOAT = ("reference", "noise_floor", "calibrate")  # stages in which the float model samples


@dataclass(frozen=True)
class Forecast:
    """What a run still has to do.

    prompts: stage -> samples of the float model that its work is like. seconds: stage -> what it took in earlier runs,
    where they tell more. per_prompt: seconds of such a sample, None = unknown; earlier: what it was in those runs.
    batch: prompts of a batch.
    """

    prompts: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    per_prompt: float | None = None
    earlier: float | None = None
    batch: int = 1

    def of(self, stage: str, per_prompt: float | None = None, ratio: float = 1.0) -> float | None:
        """Seconds that a stage is likely to take; None = nothing is known.

        per_prompt: as measured in this run. ratio: seconds of this run to those of earlier ones.
        """
        if stage in self.seconds:
            return self.seconds[stage] * ratio
        if per_prompt is None and self.per_prompt is not None:
            per_prompt = self.per_prompt * ratio
        return None if per_prompt is None or stage not in self.prompts else self.prompts[stage] * per_prompt


class Loops:
    """The loops over batches of one stage. batches: that are done; seconds: that they took; between: all other seconds
    up to the last one, such as loading.
    """

    def __init__(self) -> None:
        self.batches, self.seconds, self.between = 0, 0.0, 0.0
        self._done = self._total = 0
        self._began = self._last = time.monotonic()  # the stage; the last batch ended, or the loop began
        self._first = 0.0  # seconds of the first batch, or of the first ones that were made side by side
        self._at_once = 1

    def begin(self, at_once: int = 1) -> None:
        """One of the loops; at_once: how many of its batches are made side by side, and end together."""
        self._done, self._total, self._last, self._at_once = 0, 0, time.monotonic(), at_once

    def batch(self, done: int, total: int) -> None:
        """So many of the batches of this loop are done."""
        now = time.monotonic()
        took = now - self._last
        self._first += took if self.batches < self._at_once else 0.0
        self.batches, self.seconds = self.batches + done - self._done, self.seconds + took
        self.between = now - self._began - self.seconds
        self._done, self._total, self._last = done, total, now

    @property
    def each(self) -> float:
        """Seconds of a batch; the first, in which much happens for the first time, counts where there is no other."""
        ended = -(-self.batches // self._at_once) * self._at_once  # with those that are about to
        if self.batches > self._at_once:
            return (self.seconds - self._first) / (ended - self._at_once)
        return self.seconds / max(ended, 1)

    @property
    def rest(self) -> int:
        """Batches of this loop that are left: more than samples tell, where each lacks a few alone."""
        return self._total - self._done

    def left(self, batches: float | None = None) -> float | None:
        """Seconds of so many more batches, without a number those of this loop; None before the first is done."""
        if not self.batches:
            return None
        more = self.rest if batches is None else batches
        return max(more * self.each - (time.monotonic() - self._last), 0.0)


class Pace:
    """What this run has done so far, beside what it took earlier ones."""

    def __init__(self) -> None:
        self.stage, self.forecast, self.loops = "", Forecast(), Loops()
        self._earlier = self.forecast  # as it was before this run had done anything
        self._began = time.monotonic()
        self._took = self._guessed = 0.0  # seconds of the same work, in this run and in earlier ones
        self._sampled = self._prompts = 0.0  # seconds of samples of the float model, and of how many

    def begin(self, stage: str, forecast: Forecast) -> None:
        """A stage begins, and the one before it ends."""
        if self.stage:
            self._took, self._guessed = self._compared(whole=True)
            self._sampled, self._prompts = self._of_float()
        else:
            self._earlier = forecast
        self.stage, self.forecast, self.loops, self._began = stage, forecast, Loops(), time.monotonic()

    def left(self) -> float | None:
        """Seconds of this stage that are left; None = nothing is known."""
        if self.stage in BY_BATCHES and self.loops.batches:
            return self.loops.left(max(self._count / self.forecast.batch - self.loops.batches, self.loops.rest))
        likely, of_loop = self.of(self.stage), self.loops.left()
        here = None if likely is None else max(likely - (time.monotonic() - self._began), 0.0)
        return max((seconds for seconds in (here, of_loop) if seconds is not None), default=None)  # more loops may come

    def of(self, stage: str) -> float | None:
        """Seconds that a stage is likely to take in this run; None = nothing is known."""
        took, guessed = self._compared()
        sampled, prompts = self._of_float()
        ratio = min(max((took + EARLIER) / (guessed + EARLIER), 1 / FURTHEST), FURTHEST)
        return self.forecast.of(stage, sampled / prompts if prompts else None, ratio)

    @property
    def _count(self) -> float:
        return self.forecast.prompts.get(self.stage, 0.0)

    @property
    def _done(self) -> float:
        """Prompts of this stage that are sampled, as far as batches tell."""
        return min(self.loops.batches * self.forecast.batch, self._count) if self.stage in BY_BATCHES else 0.0

    def _of_float(self) -> tuple[float, float]:
        """Seconds of samples of the float model, and of how many prompts, this stage's among them."""
        if self.stage not in OF_FLOAT or not self._done:
            return self._sampled, self._prompts
        return self._sampled + self.loops.each * self._done / self.forecast.batch, self._prompts + self._done

    def _compared(self, whole: bool = False) -> tuple[float, float]:
        """Seconds of what this run has done and what earlier ones took for the same. whole: this stage is over."""
        took, guess = time.monotonic() - self._began, self._earlier.seconds.get(self.stage)
        if self.stage in BY_BATCHES:
            if guess is None and self.stage in OF_FLOAT and self._earlier.earlier is not None:
                guess = self._count * self._earlier.earlier
            if not self._done:  # another run may have made all that was missing
                guess = None
            elif not whole:
                took = self.loops.between + self.loops.each * self._count / self.forecast.batch
        elif not whole:
            guess = None
        if not guess or took < guess / FURTHEST:  # such as a stage with nothing left to do
            return self._took, self._guessed
        return self._took + took, self._guessed + guess
