"""The judgement of each metric as rows of the page, from the `verdict` part of metrics.json (or without it)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from viditq.report.wording import Value, digits_for, finite, interval, plain, signed

TONES = {"equal within noise": "equal", "worse": "worse", "better": "better", "differs": "differs"}
AGAINST = {"float": "vs float", "seed": "vs another seed", "bfloat16": "vs float in bfloat16"}
KINDS = {
    "fidelity": "Closeness to the float model, prompt by prompt",
    "quality": "Quality on its own",
    "distribution": "Distribution over all prompts",
    "": "Metrics",
}
DIRECTIONS = {True: "higher is better", False: "lower is better", None: "should equal the float model"}
FLOORS = {"seed": "other seed", "bfloat16": "bfloat16", "latents": "nudged"}
WORDS = {"worse": "Worse", "better": "Better", "equal": "Equal within noise"}
NOT_JUDGED = "not judged"
NOT_TOLD = "cannot be told"


@dataclass(frozen=True)
class IntervalPlot:
    """The difference, its interval and the band of noise, as percentages of the width from the left."""

    zero: float
    noise: tuple[float, float] | None
    bounds: tuple[float, float] | None
    difference: float


@dataclass(frozen=True)
class Judgement:
    """One metric, every number already in words."""

    name: str
    label: str
    short_label: str
    direction: str
    verdict: str
    tone: str
    value: str
    interval: str
    reference: str
    difference: str
    against: str
    difference_interval: str
    noise: str
    floors: tuple[tuple[str, str], ...]
    reason: str
    warning: str
    plot: IntervalPlot | None


@dataclass(frozen=True)
class Group:
    """Metrics of one kind."""

    title: str
    judgements: tuple[Judgement, ...]


def short_labels(metrics: Mapping[str, Any]) -> dict[str, str]:
    """`CLIPSIM` for "CLIPSIM (some network)", as long as no other metric is called so."""
    labels = {name: str(label.get("label", name)) for name, label in metrics.get("labels", {}).items()}
    labels = {**{name: name for name in metrics["metrics"]}, **labels}
    short = {name: label.split(" (")[0] for name, label in labels.items()}
    return {n: short[n] if list(short.values()).count(short[n]) == 1 else labels[n] for n in labels}


def judge_all(metrics: Mapping[str, Any]) -> tuple[Group, ...]:
    """Groups in the order of KINDS; metrics in the order of metrics.json."""
    verdicts = metrics.get("verdict") or {}
    kinds: dict[str, list[Judgement]] = {kind: [] for kind in KINDS}
    for name in metrics["metrics"]:
        verdict = verdicts.get(name) or {}
        kind = verdict.get("kind", "")
        kinds[kind if kind in KINDS else ""].append(judge(name, metrics, verdict))
    return tuple(Group(KINDS[kind], tuple(rows)) for kind, rows in kinds.items() if rows)


def judge(name: str, metrics: Mapping[str, Any], verdict: Mapping[str, Any]) -> Judgement:
    """One metric in words; what metrics.json lacks is left out or shown as –."""
    label = metrics.get("labels", {}).get(name, {})
    unit, error = label.get("unit", ""), metrics.get("standard_errors", {}).get(name)
    value = finite(verdict.get("value", metrics["metrics"][name]))
    reference = finite(verdict.get("float", metrics.get("float_metrics", {}).get(name)))
    bounds, difference = verdict.get("interval"), finite(verdict.get("difference"))
    difference_bounds = verdict.get("difference_interval")
    digits = digits_for(value, _half_width(bounds) or error)
    fine = digits_for(difference, _half_width(difference_bounds), verdict.get("noise"))
    word = (verdict.get("verdict") if value is not None else None) or NOT_JUDGED
    if word in TONES and difference_bounds is None:
        word = NOT_TOLD  # nothing was compared: too few prompts, or no noise floor
    shown = interval(bounds, digits)
    if not shown and finite(error) is not None:
        shown = f"± {plain(error, digits)} standard error"
    floors = [(FLOORS.get(floor, floor), number) for floor, number in (verdict.get("floors") or {}).items()]
    if first := verdict.get("on_floor_prompts"):  # distances compare at equal numbers only
        of = f"first {first['num_prompts']}"
        floors = [(f"quantized, {of}", first["value"]), (f"float, {of}", first["float"]), *floors]
    return Judgement(
        name=name,
        label=label.get("label", name),
        short_label=short_labels(metrics)[name],
        direction=DIRECTIONS.get(label.get("higher_is_better"), ""),
        verdict=word,
        tone=TONES.get(word, "unknown"),
        value=plain(value, digits, unit),
        interval=shown,
        reference=plain(reference, digits, unit) if reference is not None else "",
        difference=signed(difference, fine, unit) if difference is not None else "",
        against=AGAINST.get(verdict.get("against") or "", ""),
        difference_interval=interval(difference_bounds, fine, sign=True),
        noise=plain(verdict.get("noise"), fine, unit) if finite(verdict.get("noise")) is not None else "",
        floors=tuple((floor, plain(number, digits, unit)) for floor, number in floors if finite(number) is not None),
        reason=verdict.get("reason") or "",
        warning=verdict.get("warning") or "",
        plot=_plot(difference, difference_bounds, finite(verdict.get("noise"))),
    )


def _half_width(bounds: Sequence[Value] | None) -> float | None:
    if bounds is None or any(finite(b) is None for b in bounds):
        return None
    low, high = (float(b) for b in bounds if b is not None)
    return (high - low) / 2


def _plot(difference: float | None, bounds: Sequence[float] | None, noise: float | None) -> IntervalPlot | None:
    """Scaled so that everything including zero fills 6 to 94 per cent of the width."""
    if difference is None or (_half_width(bounds) is None and noise is None):
        return None
    ends = [0.0, difference, *(bounds or ()), *((-noise, noise) if noise is not None else ())]
    low, high = min(ends), max(ends)
    if low == high:
        return None

    def place(x: float) -> float:
        return round(6 + 88 * (x - low) / (high - low), 2)

    return IntervalPlot(
        zero=place(0.0),
        noise=(place(-noise), place(noise)) if noise is not None else None,
        bounds=(place(bounds[0]), place(bounds[1])) if bounds is not None else None,
        difference=place(difference),
    )


@dataclass(frozen=True)
class Headline:
    """The verdict in one sentence; `tone` colours it, `details` names the metrics concerned."""

    text: str
    tone: str
    details: str = ""


def headline(groups: Sequence[Group]) -> Headline:
    """What became of quality; that samples differ from float's, which those of every low-bit model do, is a detail."""
    rows = [row for group in groups for row in group.judgements]
    judged = [row for row in rows if row.tone != "unknown"]
    left = f"{len(rows) - len(judged)} of {len(rows)} metrics are not judged." if len(judged) < len(rows) else ""
    if any(row.verdict == NOT_TOLD for row in rows) and not judged:
        return Headline("Nothing can be told from this run", "unknown", "Open a row for the reason.")
    if not judged:
        return Headline("Measured, not judged", "unknown", "This run holds no verdict: it gives the numbers alone.")
    near = [row for group in groups if group.title == KINDS["fidelity"] for row in group.judgements if row in judged]
    own = [row for row in judged if row not in near]
    differ = [row.short_label for row in near if row.tone in ("differs", "worse")]
    text, tone, details = ("Quality was not measured", "differs" if differ else "equal", list[str]())
    if own:
        text, tone, details = _of_quality(own)
    if differ:
        details.append(f"Samples differ from float's beyond rounding to bfloat16: {', '.join(differ)}.")
    elif near:
        details.append("Samples are as near to float's as bfloat16's are.")
    return Headline(text, tone, " ".join([*details, left]).strip())


def _of_quality(rows: Sequence[Judgement]) -> tuple[str, str, list[str]]:
    """Text, tone and details."""
    named = {tone: [row.short_label for row in rows if row.tone == tone] for tone in ("worse", "better", "equal")}
    on = f"all {len(rows)} quality metrics" if len(rows) > 1 else "the one quality metric"
    details = [f"{word}: {', '.join(named[tone])}." for tone, word in WORDS.items() if named[tone]]
    if named["worse"]:
        some = on if len(named["worse"]) == len(rows) else f"{len(named['worse'])} of {len(rows)} quality metrics"
        return f"Quality lost: worse than float on {some}", "worse", details
    if named["better"]:
        return f"Quality held: no worse than float on {on}", "better", details
    return f"Quality held: equal to float within noise on {on}", "equal", []
