"""A row of a leaderboard: one configuration, its runs differing in the seed alone, and its score in each metric."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from viditq.report.paired import Z95, Interval, IntervalOf, Paired, Prompt, paired_difference
from viditq.report.table import decimals, number, value_and_error

DIFFERS, UNTOLD = "differ by seed", "cannot be told"


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
class Row:
    """One configuration; `metrics` and `per_prompt` are those files of each seed, `link` a page about its first run."""

    name: str
    metrics: Sequence[Mapping[str, Any]]
    link: str = ""
    per_prompt: Sequence[Mapping[str, Any]] = ()

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
    def seconds(self) -> float:
        return min(m["seconds"].get("generate", math.nan) for m in self.metrics)

    @property
    def seeds(self) -> list[int]:
        return sorted(m["seed"] for m in self.metrics)

    def score(self, name: str) -> Score | None:
        """One metric over all seeds; None if a seed did not measure it or found it undefined."""
        values = [m["metrics"].get(name) for m in self.metrics]
        if any(v is None for v in values):
            return None
        entries = [m.get("verdict", {}).get(name) for m in self.metrics]
        verdicts = {word(entry) for entry in entries}
        verdict = verdicts.pop() if len(verdicts) == 1 else DIFFERS
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
        """The paired difference of a metric; None where the two rows do not share seeds and prompts."""
        mine, theirs = self.values(name), other.values(name)
        return paired_difference(mine, theirs, interval_of) if self.seeds == other.seeds else None

    @property
    def verdict(self) -> str:
        """`worse: PSNR, SSIM; 4 equal`, worst first; empty where nothing was judged."""
        groups: dict[str, list[str]] = {"worse": [], "better": [], DIFFERS: [], UNTOLD: [], "equal within noise": []}
        for name, label in self.metrics[0]["labels"].items():
            if (score := self.score(name)) and score.verdict:
                groups[score.verdict].append(short(label["label"]))
        named = [f"{verdict}: {', '.join(groups[verdict])}" for verdict in ("worse", "better") if groups[verdict]]
        words = {DIFFERS: DIFFERS, UNTOLD: UNTOLD, "equal within noise": "equal"}
        counted = [f"{len(groups[verdict])} {shown}" for verdict, shown in words.items()]
        return "; ".join([*named, *(text for text in counted if not text.startswith("0 "))])


def word(entry: Mapping[str, Any] | None) -> str:
    """A verdict; empty where a metric was not judged, and said so where nothing was there to judge by."""
    if entry is None:
        return ""
    return entry["verdict"] if entry["difference_interval"] is not None else UNTOLD


def single_interval(metrics: Mapping[str, Any], name: str) -> Interval | None:
    """The verdict's 95 % interval of a single run (none for too few prompts), or one from the standard error where it
    was not judged."""
    if name in metrics.get("verdict", {}):
        judged = metrics["verdict"][name]["interval"]
        return (judged[0], judged[1]) if judged else None
    value, error = metrics["metrics"][name], metrics.get("standard_errors", {}).get(name)
    return None if error is None else (value - Z95 * error, value + Z95 * error)


def short(label: str) -> str:
    """A label without what stands in brackets."""
    return label.split(" (")[0]
