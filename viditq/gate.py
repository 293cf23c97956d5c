"""A gate: conditions on the numbers of a finished run, for the exit code of somebody's CI (docs/verdict.md)."""

import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from viditq.errors import UserError, close_names
from viditq.metrics.headline import is_told

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
}
VERDICTS = {"equal": ("equal within noise",), "not worse": ("equal within noise", "better")}
OF_RUN = ("size_bytes", "average_weight_bits", "average_activation_bits")
EXAMPLE = 'gate={psnr: ">= 30", clipsim_drop: "<= 0.005", ssim_verdict: "not worse"}'


class Unmeasured(Exception):
    """Why a number is not there."""


@dataclass(frozen=True)
class Condition:
    """`key` as the user wrote it; `what` is "" (the metric or run number itself), low, high, drop or verdict."""

    key: str
    name: str
    what: str
    wanted: str

    def failure(self, metrics: Mapping[str, Any]) -> str | None:
        """What was wanted and found where the condition does not hold; None where it does."""
        try:
            found = READERS[self.what](self.name, metrics)
        except Unmeasured as error:
            return f"{self.key}: wanted {self.wanted}, but {error}"
        if self._holds(found):
            return None
        return f"{self.key}: wanted {self.wanted}, found {found if isinstance(found, str | int) else f'{found:.6g}'}"

    def _holds(self, found: Any) -> bool:
        if self.what == "verdict":
            return found in VERDICTS[self.wanted]
        sign, bound = self.wanted.split()
        return OPERATORS[sign](found, float(bound))


@dataclass(frozen=True)
class Gate:
    """Conditions that must all hold."""

    conditions: tuple[Condition, ...] = ()

    @classmethod
    def parse(
        cls, mapping: Mapping[str, Any] | None, metric_names: Collection[str], with_float: Collection[str] | None = None
    ) -> "Gate":
        """The gate of a configuration, {} or None for none.

        with_float: the metrics that have a float value of their own, where known: others have no drop.
        Raises UserError for an unknown key (with close names) or a condition that cannot be read.
        """
        if mapping is not None and not isinstance(mapping, Mapping):
            raise UserError(f"gate={mapping!r} is no list of conditions. Write it like {EXAMPLE}.")
        return cls(tuple(_parse(str(k), v, metric_names, with_float) for k, v in (mapping or {}).items()))

    def check(self, metrics: Mapping[str, Any]) -> list[str]:
        """One line per condition that the content of metrics.json does not meet."""
        return [failure for c in self.conditions if (failure := c.failure(metrics)) is not None]


def _parse(key: str, wanted: Any, metric_names: Collection[str], with_float: Collection[str] | None) -> Condition:
    name, what = _split(key, metric_names)
    if what == "drop" and with_float is not None and name not in with_float:
        raise UserError(
            f"gate.{key}: {name} has no value of the float model to drop from. Bound {name} itself, or use "
            f"{name}_verdict."
        )
    return Condition(key, name, what, _verdict(key, wanted) if what == "verdict" else _bound(key, wanted))


def _split(key: str, metric_names: Collection[str]) -> tuple[str, str]:
    """The metric or run number a key is about, and what of it."""
    known = {name: (name, "") for name in (*metric_names, *OF_RUN)}
    known |= {f"{name}_{what}": (name, what) for what in READERS if what for name in metric_names} | known
    if key not in known:
        raise UserError(
            f"gate.{key} is not known; {close_names(key, known)}. Known are the run's metrics ("
            f"{', '.join(sorted(metric_names))}), each also with _low, _high, _drop or _verdict at its end, and "
            f"{', '.join(OF_RUN)}."
        )
    return known[key]


def _verdict(key: str, wanted: Any) -> str:
    if wanted not in VERDICTS:
        raise UserError(f"gate.{key}={wanted!r}. Use one of: {', '.join(VERDICTS)}.")
    return wanted


def _bound(key: str, wanted: Any) -> str:
    """`>= 30`, spaced like that."""
    found = re.fullmatch(r"\s*(>=|<=|==|>|<)\s*(\S+)\s*", wanted) if isinstance(wanted, str) else None
    try:
        number = float(found[2]) if found else math.nan
    except ValueError:
        number = math.nan
    if not found or not math.isfinite(number):
        raise UserError(f"gate.{key}={wanted!r}. Write one of {' '.join(OPERATORS)} and a number, as in {EXAMPLE}.")
    return f"{found[1]} {found[2]}"


# What is read from metrics.json ---------------------------------------------------------------------------------------


def _number(name: str, metrics: Mapping[str, Any]) -> float:
    value = metrics[name] if name in OF_RUN else metrics["metrics"].get(name)
    if value is None:
        raise Unmeasured(f"{name} came out undefined")
    return value


def _entry(name: str, metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    if name not in metrics.get("verdict", {}):
        raise Unmeasured("metrics.json holds no verdict of it: delete that file and run the command again")
    return metrics["verdict"][name]


def _end(which: int) -> Callable[[str, Mapping[str, Any]], float]:
    def read(name: str, metrics: Mapping[str, Any]) -> float:
        interval = _entry(name, metrics)["interval"]
        if interval is None:
            raise Unmeasured(f"{name} has no interval: too few prompts, or a score is undefined")
        return interval[which]

    return read


def _drop(name: str, metrics: Mapping[str, Any]) -> float:
    """How much worse than the float model's own value, as a fraction of it; negative where better."""
    value, own = _number(name, metrics), metrics["float_metrics"].get(name)
    if not own:
        what = "no value of the float model" if own is None else "a value of 0 with the float model and nothing"
        raise Unmeasured(f"{name} has {what} to drop from")
    change, higher = (value - own) / abs(own), metrics["labels"][name]["higher_is_better"]
    return abs(change) if higher is None else -change if higher else change


def _word(name: str, metrics: Mapping[str, Any]) -> str:
    entry = _entry(name, metrics)
    if not is_told(entry):
        raise Unmeasured(entry["warning"])
    return entry["verdict"]


READERS: dict[str, Callable[[str, Mapping[str, Any]], Any]] = {
    "": _number,
    "low": _end(0),
    "high": _end(1),
    "drop": _drop,
    "verdict": _word,
}
