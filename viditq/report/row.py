"""A row of a leaderboard: one configuration, its runs differing in the seed alone, and its score in each metric."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from viditq.errors import UserError
from viditq.report.paired import Z95, Interval, IntervalOf, Paired, Prompt, paired_difference
from viditq.report.speed import conditions, emulated, measured, milliseconds
from viditq.report.table import decimals, number, value_and_error

BY_SEED, UNTOLD = "differ by seed", "cannot be told"
COUNTED = {  # verdict -> how it is said of so many metrics
    BY_SEED: BY_SEED,
    UNTOLD: UNTOLD,
    "equal within noise": "equal",
    "differs": "differ from float's",
}


@dataclass(frozen=True)
class Score:
    """A metric's value with its standard error over seeds, or with the 95 % interval of a single seed."""

    value: float
    error: float | None
    interval: Interval | None
    verdict: str = ""
    warning: str = ""

    @property
    def text(self) -> str:
        """`35.47 ± 0.17` or `35.50 [34.44, 36.55]`, starred where there is a warning."""
        return self._number + "*" * bool(self.warning)

    @property
    def _number(self) -> str:
        if self.interval is None:
            return value_and_error(self.value, self.error)
        low, high = self.interval
        digits = decimals(self.value, (high - low) / (2 * Z95))
        return f"{number(self.value, digits)} [{number(low, digits)}, {number(high, digits)}]"

    @property
    def bounds(self) -> Interval:
        """What an error bar spans."""
        error = self.error or 0.0
        return self.interval or (self.value - error, self.value + error)


@dataclass(frozen=True)
class Step:
    """The measured time of a step of the denoiser; conditions: batch, threads and machine, on which it hangs."""

    seconds: float
    against_float: float
    emulated: bool
    conditions: str

    @property
    def text(self) -> str:
        """`31.4 ms, 1.80x float`, and whether it was emulated."""
        return f"{milliseconds(self.seconds)}, {self.against_float:.2f}x float" + ", emulated" * self.emulated


@dataclass(frozen=True)
class Row:
    """One configuration; `metrics`, `per_prompt` and `speeds` are those files of each seed (speed.json: None where it
    was not measured), `link` a page about its first run, `folder` that run's own.
    """

    name: str
    metrics: Sequence[Mapping[str, Any]]
    per_prompt: Sequence[Mapping[str, Any]]
    link: str = ""
    speeds: Sequence[Mapping[str, Any] | None] = ()
    folder: str = ""

    @property
    def weight_bits(self) -> float:
        return self._mean("average_weight_bits")

    @property
    def activation_bits(self) -> float:
        return self._mean("average_activation_bits")

    @property
    def megabytes(self) -> float:
        return self._mean("size_bytes") / 1e6

    def _mean(self, name: str) -> float:
        """Over seeds, which differ where each has searched a plan of its own."""
        return statistics.fmean(m[name] for m in self.metrics)

    @property
    def step(self) -> Step | None:
        """The median over the seeds that measured it; None if none has."""
        known = [speed for speed in self.speeds if speed is not None]
        if not known:
            return None
        seconds, ratios = zip(*map(_against_float, known), strict=True)
        hidden = any(emulated(speed["backend"]) for speed in known)
        where = "; ".join(sorted({conditions(speed) for speed in known}))
        return Step(statistics.median(seconds), statistics.median(ratios), hidden, where)

    @property
    def memory_megabytes(self) -> float:
        """Of the denoiser's weights while a step is computed; nan where none was measured."""
        known = [measured(speed)[0]["weights_bytes"] for speed in self.speeds if speed is not None]
        return statistics.median(known) / 1e6 if known else math.nan

    @property
    def step_milliseconds(self) -> float:
        """What ranks and is plotted: nan where nothing was measured, or an emulation."""
        step = self.step
        return math.nan if step is None or step.emulated else 1e3 * step.seconds

    @property
    def seeds(self) -> list[int]:
        return sorted(m["seed"] for m in self.metrics)

    @property
    def pairs(self) -> int:
        """Evaluation prompts, which each seed has."""
        return int(self.metrics[0]["prompts"])

    @property
    def prompts(self) -> list[str]:
        return list(self.per_prompt[0]["prompts"])

    @property
    def inputs(self) -> tuple[tuple[int, str], ...]:
        """Seed and name of the float samples of each run; the name hangs on seed, prompts and all that samples them."""
        runs = zip(self.metrics, self.per_prompt, strict=True)
        return tuple(sorted((m["seed"], Path(values["reference"]).name) for m, values in runs))

    def score(self, name: str) -> Score | None:
        """One metric over all seeds; None if a seed did not measure it or found it undefined."""
        values = [m["metrics"].get(name) for m in self.metrics]
        if any(v is None for v in values):
            return None
        entries = [m.get("verdict", {}).get(name) for m in self.metrics]
        verdicts = {word(entry) for entry in entries}
        verdict = verdicts.pop() if len(verdicts) == 1 else BY_SEED
        warning = next((entry["warning"] for entry in entries if entry and entry.get("warning")), "")
        mean = statistics.fmean(values)
        if len(values) > 1:
            return Score(mean, statistics.stdev(values) / math.sqrt(len(values)), None, verdict, warning)
        return Score(mean, None, single_interval(self.metrics[0], name), verdict, warning)

    def values(self, name: str) -> dict[Prompt, list[float]]:
        """Prompt -> its values, one for each seed; empty where a metric has no value per prompt."""
        found: dict[Prompt, list[float]] = {}
        for part in self.per_prompt:
            for prompt, value in zip(enumerate(part["prompts"]), part["metrics"].get(name, []), strict=False):
                found.setdefault(prompt, []).append(value)
        return found

    def minus(self, other: "Row", name: str, interval_of: IntervalOf) -> Paired | None:
        """The paired difference of a metric to a row of the same inputs; None where one has no value per prompt."""
        return paired_difference(self.values(name), other.values(name), interval_of)

    @property
    def verdict(self) -> str:
        """`worse: CLIPSIM; 4 equal; 2 differ from float's`, worst first; empty where nothing was judged."""
        groups: dict[str, list[str]] = {name: [] for name in ("worse", "better", *COUNTED)}
        for name, label in self.metrics[0]["labels"].items():
            if (score := self.score(name)) and score.verdict:
                groups[score.verdict].append(short(label["label"]))
        named = [f"{verdict}: {', '.join(groups[verdict])}" for verdict in ("worse", "better") if groups[verdict]]
        counted = [f"{len(groups[verdict])} {shown}" for verdict, shown in COUNTED.items()]
        return "; ".join([*named, *(text for text in counted if not text.startswith("0 "))])


def _against_float(speed: Mapping[str, Any]) -> tuple[float, float]:
    """Seconds of the quantized step, and the float one's divided by it."""
    mine, others = measured(speed)
    median = float(mine["seconds"]["median"])
    return median, next(iter(others.values()))["seconds"]["median"] / median


def labels_of(rows: Sequence[Row]) -> dict[str, Mapping[str, Any]]:
    """Metric -> label, unit and direction, of all that any row measured; those of the row with the most come first."""
    metrics: dict[str, Mapping[str, Any]] = {}
    for row in sorted(rows, key=lambda row: -len(row.metrics[0]["metrics"])):
        metrics |= {name: label for name, label in row.metrics[0]["labels"].items() if name not in metrics}
    return metrics


def directed(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The metrics of which higher or lower is better."""
    return [name for name, label in metrics.items() if label["higher_is_better"] is not None]


def ranking_metric(what: str, metrics: Mapping[str, Mapping[str, Any]], wanted: str | None) -> str:
    """The metric to rank by: the one wanted, else the first with a better direction; raises UserError without any."""
    known = directed(metrics)
    if not known or (wanted is not None and wanted not in known):
        choices = f"Choose one of {', '.join(known)}" if known else "Measure psnr too"
        raise UserError(f"{wanted or what}: no metric that ranks runs, higher or lower being better. {choices}.")
    return wanted or known[0]


def word(entry: Mapping[str, Any] | None) -> str:
    """A verdict; empty where a metric was not judged, and said so where nothing was there to judge by."""
    if entry is None:
        return ""
    return entry["verdict"] if entry["difference_interval"] is not None else UNTOLD


def single_interval(metrics: Mapping[str, Any], name: str) -> Interval | None:
    """The verdict's 95 % interval of a single run (none for too few prompts); one from the standard error where it was
    not judged.
    """
    if name in metrics.get("verdict", {}):
        judged = metrics["verdict"][name]["interval"]
        return (judged[0], judged[1]) if judged else None
    value, error = metrics["metrics"][name], metrics.get("standard_errors", {}).get(name)
    return None if error is None else (value - Z95 * error, value + Z95 * error)


def short(label: str) -> str:
    """A label without what stands in brackets."""
    return label.split(" (")[0]
