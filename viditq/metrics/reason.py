"""Why a verdict is what it is, in one sentence that needs no statistics to be read."""

from collections.abc import Mapping
from typing import Any

from viditq.metrics.comparison import Comparison
from viditq.metrics.headline import EQUAL

BASELINES = {
    "float": "the float model's {}",
    "bfloat16": "the {} that bfloat16 alone leaves",
    "seed": "the {} that another seed alone gives",
}


def reason(label: Mapping[str, Any], entry: Mapping[str, Any], comparison: Comparison) -> str:
    """The sentence of one metric; `entry` is the rest of its verdict."""
    unit = f" {label['unit']}" if label["unit"] else ""
    value = "undefined" if entry["value"] is None else plain(entry["value"]) + unit
    sentence = f"{label['label']} is {value}{_difference(comparison, unit)}"
    if comparison.interval is not None:
        low, high = (plain(x, 3) for x in comparison.interval)
        sentence += f" (95 % interval of the difference: {low} to {high}){_because(entry['verdict'], comparison, unit)}"
    if (moved := entry["floors"].get("latents")) is not None:
        worst = "" if entry["latents_worst"] is None else f", {plain(entry['latents_worst'])}{unit} in the worst pair"
        sentence += f". Noise too small to mean anything, on float's latents, leaves {plain(moved)}{unit}{worst}"
    warning = entry["warning"]
    return f"{sentence}." + (f" {warning[0].upper()}{warning[1:]}." if warning else "")


def _difference(comparison: Comparison, unit: str) -> str:
    difference, baseline = comparison.difference, comparison.baseline
    if difference is None or baseline is None or comparison.against is None:
        return ""
    what = BASELINES[comparison.against].format(plain(baseline) + unit)
    apart = f"{plain(abs(difference), 3)}{unit} {'above' if difference > 0 else 'below'}" if difference else "exactly"
    prompts = f"{comparison.num_prompts} prompts" if comparison.num_prompts else "the first prompts"
    if comparison.against == "float":
        return f", {apart} {what}" + (f" on {prompts}" if comparison.num_prompts else "")
    return f"; on {prompts} it is {apart} {what}"


def _because(verdict: str, comparison: Comparison, unit: str) -> str:
    low, high = comparison.interval or (0, 0)
    if low <= 0 <= high:
        return ": no difference can be seen"
    if comparison.against != "float":
        return ": no further from float than that" if verdict == EQUAL else ""
    if comparison.noise is None:
        return "; how far another seed moves it was not measured"
    beyond = "no more than" if verdict == EQUAL else "more than"
    return f", {beyond} the {plain(comparison.noise, 3)}{unit} by which another seed moves it"


def plain(value: float, digits: int = 4) -> str:
    """A number with `digits` significant digits, never in powers of ten unless it is tiny."""
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
