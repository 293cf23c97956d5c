"""What the page says, as its caller describes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from viditq.report.media import Clips
from viditq.report.plan_view import RolePlan
from viditq.report.sound import Sounds
from viditq.report.stage_seconds import Conditions
from viditq.report.verdicts import short_labels
from viditq.report.wording import Value, finite

MAX_PAIRS = 24


@dataclass(frozen=True)
class Pair:
    """One prompt's float and quantized clip; `scores` are its per-prompt metrics (None or nan where there is none).

    conditions: what sampling started from, by the argument that took it, uint8 [F, C, H, W]. sounds: what is heard
    beside the clips, None where the model makes none.
    """

    index: int
    prompt: str
    clips: Clips
    scores: Mapping[str, Value]
    conditions: Mapping[str, Tensor] = field(default_factory=dict)
    sounds: Sounds | None = None


@dataclass(frozen=True)
class Machine:
    """What the run ran on; `gpu` is None without one."""

    cpu: str
    cores: int
    gpu: str | None = None


@dataclass(frozen=True)
class PageContent:
    """Everything the page says.

    `metrics`, `per_prompt` and `errors` are the contents of metrics.json, per_prompt.json and errors.json (None where
    that stage has not run). `segments` are noise levels from 0 to 1. `pairs` come worst first and already limited (to
    MAX_PAIRS, if the caller has no other wish); `sorted_by` names the metric that ordered them. `search`,
    `heat_map` and `budget_curve` are the content of search.json and its pictures, where a plan was searched;
    `treatments` and `treatments_picture` the same of treatments.json;
    `incoherence` and `speed` are the content of incoherence.json and speed.json, where there is one; `conditions` say
    what the seconds of metrics.json were measured on.
    """

    title: str
    experiment: str
    model: str
    seed: int
    command: str
    versions: Mapping[str, str]
    machine: Machine
    metrics: Mapping[str, Any]
    per_prompt: Mapping[str, Any]
    errors: Mapping[str, Any] | None
    segments: Sequence[float]
    plan: Sequence[RolePlan]
    configuration: str
    pairs: Sequence[Pair]
    sorted_by: str
    frames_per_second: float = 8.0
    search: Mapping[str, Any] | None = None
    heat_map: Path | None = None
    budget_curve: Path | None = None
    treatments: Mapping[str, Any] | None = None
    treatments_picture: Path | None = None
    incoherence: Mapping[str, Any] | None = None
    speed: Mapping[str, Any] | None = None
    conditions: Conditions = field(default_factory=dict)

    @property
    def scored(self) -> list[str]:
        """Names of the per-prompt metrics, without the float model's own columns; the one that sorted comes first."""
        names = self.per_prompt["metrics"]
        own = [name for name in names if not (name.endswith("_float") and name.removesuffix("_float") in names)]
        return sorted(own, key=lambda name: name != self.sorted_by)

    def label(self, name: str) -> str:
        """What people call a metric, without the network it uses."""
        return short_labels(self.metrics).get(name, name)

    def unit(self, name: str) -> str:
        return str(self._labels(name).get("unit", ""))

    def higher_is_better(self, name: str) -> bool | None:
        return self._labels(name).get("higher_is_better")

    def reference_score(self, name: str, index: int) -> float | None:
        """The float model's own score at prompt `index`, where it has one."""
        values = self.per_prompt["metrics"].get(f"{name}_float")
        return finite(values[index]) if values is not None and index < len(values) else None

    def _labels(self, name: str) -> Mapping[str, Any]:
        return self.metrics.get("labels", {}).get(name, {})
