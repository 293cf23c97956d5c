"""Tuning: Optuna proposes numbers, each trial is a job of a sweep, the sweep's records are the study's memory."""

import math
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from viditq.config import program
from viditq.errors import UserError, extra_command
from viditq.files import read_json, write_json
from viditq.sweeps.records import JobRecord, read_jobs

Params = dict[str, float]
ATTEMPTS = 20  # proposals that repeat an earlier trial before one is taken all the same
DIGITS = 10  # after the point, which a trial's numbers have at most
LOWEST = {"n_trials": 1, "max_batch_size": 1, "startup_trials": 0, "seed": 0}


@dataclass(frozen=True)
class Range:
    """A number's grid: from `low` to `high` in steps; the first trial takes `start`. Odd ones raise UserError."""

    low: float
    high: float
    step: float
    start: float

    def __post_init__(self) -> None:
        given = asdict(self)
        odd = [key for key, value in given.items() if not is_number(value) or round(value, DIGITS) != value]
        if odd:
            raise UserError(f"{given}: {', '.join(odd)} must be a number of at most {DIGITS} digits after the point.")
        if not (self.low <= self.start <= self.high and self.step > 0):
            raise UserError(f"{given}: it takes low <= start <= high and step > 0.")
        for key in ("start", "high"):
            steps = (given[key] - self.low) / self.step
            if abs(steps - round(steps)) > 1e-8:  # as Optuna has it
                near = [round(self.low + self.step * whole(steps), DIGITS) for whole in (math.floor, math.ceil)]
                raise UserError(
                    f"{given}: {key} must be a whole number of steps above low, such as {near[0]} or {near[1]}."
                )

    @classmethod
    def parse(cls, name: str, given: Any) -> "Range":
        """The range of the parameter `name` of a configuration; raises UserError for one that is no range."""
        where, keys = f"hydra.sweeper.params.{name}", [field.name for field in fields(cls)]
        if not isinstance(given, Mapping) or set(given) != set(keys):
            raise UserError(f"{where}={given} must have the keys {', '.join(keys)}, and no others.")
        try:
            return cls(**given)
        except UserError as error:
            raise UserError(f"{where}={error}") from error


@dataclass(frozen=True)
class Tuning:
    """What is tuned: a metric's mean, by numbers that fill in overrides (`quant.smoothing.alpha=[{low},{high}]`)."""

    objective: str
    direction: Literal["maximize", "minimize"]
    n_trials: int  # in all, those of earlier calls included
    max_batch_size: int  # trials proposed together, and run side by side if the launcher can
    seed: int
    startup_trials: int  # random ones before TPE has something to learn from
    params: dict[str, Range] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.direction not in ("maximize", "minimize"):
            raise UserError(f"hydra.sweeper.direction={self.direction}. Give maximize or minimize.")
        for key, lowest in LOWEST.items():
            value = getattr(self, key)
            if type(value) is not int or not lowest <= value < 2**31:
                raise UserError(f"hydra.sweeper.{key}={value}. Give a whole number of {lowest} or more.")
        if not self.params:
            raise UserError("hydra.sweeper.params is empty: nothing to tune. See conf/experiment/tune_alpha.yaml.")
        self._check_overrides()

    def _check_overrides(self) -> None:
        where, names = "hydra.sweeper.overrides", ", ".join(self.params)
        for text in self.overrides:
            if not isinstance(text, str) or "=" not in text:
                raise UserError(
                    f"{where}={self.overrides}: {text!r} is no override such as quant.segments=[0.0,{{edge}},1.0]."
                )
        try:
            used = {name for text in self.overrides for _, name, _, _ in Formatter().parse(text) if name is not None}
            self.settings({name: r.start for name, r in self.params.items()})
        except (KeyError, IndexError) as error:
            raise UserError(f"{where} names {error}, which is no parameter. There are {names}.") from error
        except (ValueError, AttributeError) as error:
            raise UserError(f"{where}={self.overrides}: {error}. Braces hold a name alone: {names}.") from error
        if idle := [name for name in self.params if name not in used]:
            raise UserError(
                f"{where} does not use {', '.join(idle)}: it would be tuned for nothing. Name it, or leave it out."
            )
        if again := [key for key, count in Counter(self.keys).items() if count > 1]:
            raise UserError(f"{where} sets {again[0]} twice. Leave one out.")

    @property
    def keys(self) -> list[str]:
        """What the overrides set."""
        return [key_of(text) for text in self.overrides]

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> "Tuning":
        """From the settings of the sweeper, as plain values; raises UserError for any that cannot work."""
        known = [field.name for field in fields(cls)]
        for word, keys in (("Unknown key", set(settings) - {*known}), ("Missing key", {*known} - set(settings))):
            if keys:
                raise UserError(f"{word} hydra.sweeper.{min(keys)}. A tuning has {', '.join(known)}.")
        for key, kind in (("params", Mapping), ("overrides", list)):
            if not isinstance(settings[key], kind):
                raise UserError(
                    f"hydra.sweeper.{key}={settings[key]}. See conf/experiment/tune_alpha.yaml for its form."
                )
        params = {name: Range.parse(name, given) for name, given in settings["params"].items()}
        return cls(**{**settings, "params": params})

    def settings(self, params: Mapping[str, float]) -> list[str]:
        """The overrides that `params` stand for."""
        return [text.format(**{name: f"{value:.10g}" for name, value in params.items()}) for text in self.overrides]

    def propose(self, trials: Sequence[Params], values: Mapping[int, float]) -> Params:
        """The next trial's numbers: `start` first, then TPE's, given the values of finished trials.

        The same history gives the same proposal, so an interrupted study goes on as it would have.
        """
        if not trials:
            return {name: r.start for name, r in self.params.items()}
        optuna = import_optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space = {
            name: optuna.distributions.FloatDistribution(r.low, r.high, step=r.step) for name, r in self.params.items()
        }
        proposal: Params = {}
        for attempt in range(ATTEMPTS):
            seed = self.seed + ATTEMPTS * len(trials) + attempt
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=self.startup_trials)
            study = optuna.create_study(direction=self.direction, sampler=sampler)
            study.add_trials(
                optuna.create_trial(params=trials[number], distributions=space, value=value)
                for number, value in sorted(values.items())
            )
            proposal = {name: round(value, DIGITS) for name, value in study.ask(space).params.items()}
            if proposal not in trials:
                break
        return proposal

    def values(self, jobs: Sequence[JobRecord]) -> dict[int, float]:
        """Trial -> objective, of those that finished with one."""
        found = {job.num: job.metrics.get("metrics", {}).get(self.objective) for job in jobs if job.status == "done"}
        return {num: value for num, value in found.items() if value is not None}

    def best(self, values: Mapping[int, float]) -> int:
        """The number of the best trial."""
        return (max if self.direction == "maximize" else min)(sorted(values), key=lambda number: values[number])


def tune(tuning: Tuning, folder: Path, base: list[str], launch: Callable[[list[list[str]], int], object]) -> None:
    """Run trials until there are `n_trials`; first those of an earlier call that did not finish, with their numbers.

    `launch(overrides of each job, number of the first)` returns when these have ended; a failed trial has no value and
    the study goes on. `base` are the overrides that all trials share. Writes trials.json before a trial starts and
    best.json at the end.
    """
    import_optuna()  # missing, it is missed now and not after the first trial
    file = folder / "trials.json"
    trials: list[Params] = read_json(file) if file.is_file() else []
    jobs = {job.num: job for job in read_jobs(folder)}
    waiting = [n for n in range(min(len(trials), tuning.n_trials)) if n not in jobs or jobs[n].status != "done"]
    while waiting or len(trials) < tuning.n_trials:
        if not waiting:  # a batch is proposed as a whole, from what had finished before it, cut off or not
            finished, first = tuning.values(read_jobs(folder)), len(trials)
            for _ in range(min(tuning.max_batch_size, tuning.n_trials - first)):
                trials.append(tuning.propose(trials, finished))
            waiting = list(range(first, len(trials)))
            write_json(file, trials)
        batch, waiting = waiting[: tuning.max_batch_size], waiting[tuning.max_batch_size :]
        for first, numbers in contiguous(batch):
            launch([[*base, *tuning.settings(trials[n])] for n in numbers], first)
    values = {n: value for n, value in tuning.values(read_jobs(folder)).items() if n < len(trials)}
    if not values:
        raise UserError(f"None of the {len(trials)} trials finished with a value of {tuning.objective}.")
    write_best(tuning, folder, base, trials, values)


def is_number(value: Any) -> bool:
    """Whether it is finite, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def key_of(override: str) -> str:
    """`quant.segments` of `++quant.segments=[0,1]`"""
    return override.partition("=")[0].lstrip("+~")


def import_optuna() -> Any:
    """Optuna, which comes with an extra. Raises UserError where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise UserError(f"A tuning needs Optuna: {extra_command('sweeps')}.") from error
    return optuna


def contiguous(numbers: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Runs of consecutive numbers with their first: a launcher numbers its jobs one after another."""
    groups = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in groups]
    return [(run[0], run) for run in runs]


def write_best(
    tuning: Tuning, folder: Path, base: list[str], trials: Sequence[Params], values: Mapping[int, float]
) -> None:
    """The best trial's numbers and the command that runs it alone."""
    number = tuning.best(values)
    words = [*base, "hydra.mode=RUN", *tuning.settings(trials[number])]
    best = {"objective": tuning.objective, "direction": tuning.direction, "value": values[number], "trial": number}
    command = shlex.join([*program(), *words])
    write_json(folder / "best.json", {**best, "params": trials[number], "overrides": words, "command": command})
