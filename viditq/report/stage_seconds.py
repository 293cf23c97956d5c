"""The seconds of a run's stages, and which of them may be set side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

STAGES = {
    "prompts": "encode prompts",
    "reference": "generate with float",
    "noise_floor": "float against itself",
    "calibrate": "calibrate",
    "search": "search bits",
    "quantize": "quantize",
    "generate": "generate quantized",
    "diagnose": "diagnose layers",
    "benchmark": "time a step",
    "evaluate": "evaluate",
}
FLOAT, QUANTIZED = "reference", "generate"
UNKNOWN = "what was not recorded"  # of earlier versions
Conditions = Mapping[str, Sequence[str]]
"""Stage -> what its seconds were measured on, in words; several where it was not the same all the time."""


@dataclass(frozen=True)
class StageSeconds:
    """bars: (what, seconds, per cent of the longest). apart: why float and quantized samples do not compare; empty
    where they do. others: which other stages were measured on something else.
    """

    bars: list[tuple[str, float, float]]
    apart: str
    others: str


def stage_seconds(seconds: Mapping[str, float], conditions: Conditions) -> StageSeconds:
    """In the order of the stages."""
    names = sorted(seconds, key=lambda name: list(STAGES).index(name) if name in STAGES else len(STAGES))
    longest = max(seconds.values(), default=0.0) or 1.0
    bars = [(STAGES.get(name, name), seconds[name], round(100 * seconds[name] / longest, 1)) for name in names]
    ours = _words(conditions, QUANTIZED)
    places = {name: _words(conditions, name) for name in names if name not in (FLOAT, QUANTIZED)}
    others = [f"{STAGES.get(name, name)} on {on}" for name, on in places.items() if on not in (ours, UNKNOWN)]
    told = f"Also measured on something else: {'; '.join(others)}." if others and ours != UNKNOWN else ""
    return StageSeconds(bars, not_comparable(seconds, conditions), told)


def not_comparable(seconds: Mapping[str, float], conditions: Conditions) -> str:
    """Why the seconds of float and quantized samples are not to be set against each other; empty where they may be."""
    if not {FLOAT, QUANTIZED} <= seconds.keys():
        return ""
    theirs, ours = _words(conditions, FLOAT), _words(conditions, QUANTIZED)
    if theirs == ours and len(conditions.get(FLOAT, ())) == 1 and ours != UNKNOWN:
        return ""
    why = f"float was generated on {theirs}, quantized on {ours}"
    if theirs == ours == UNKNOWN:
        why = "an earlier version made them, which did not record on what"
    return f"The seconds of float and quantized samples do not compare: {why}."


def _words(conditions: Conditions, stage: str) -> str:
    return ", then ".join(conditions.get(stage, ())) or UNKNOWN
