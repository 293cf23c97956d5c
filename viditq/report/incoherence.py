"""incoherence.json as two charts and two tables: how far the largest values of each layer stick out.

Layers stand side by side, those of a role together, inside a role in the order of the network; the axis of the values
is logarithmic. Units of the view box as in charts.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, log10
from statistics import median
from typing import Any

from viditq.report.wording import three_digits

VARIANTS = {"raw": "whole", "scaled": "c1", "rotated": "c0", "both": "c2"}  # name -> CSS class
SIDES = {"activation": "Activations", "weight": "Weights"}
MANY = 100  # layers; charts of more are wider, and scroll on a phone
LEFT, RIGHT, TOP, BOTTOM, HEIGHT, HIGH = 44, 6, 8, 44, 250, 330
ROOM = 1.08  # between the outermost values and the ends of the axis, as a factor
LETTER, PHONE_LETTER = 6.0, 9.5  # about the width of a letter of the axis on a desktop and on a phone


@dataclass(frozen=True)
class Group:
    """The layers of one role: words (in lines) in the middle of left..right. fits: "" | "roomy" (not on a phone)."""

    left: float
    right: float
    words: tuple[str, ...]
    fits: str | None


@dataclass(frozen=True)
class IncoherenceChart:
    """One side's chart. `stems` joins the values of each layer, `dots` are (css, path), `hits` (x, words) by layer."""

    title: str
    description: str
    y_ticks: tuple[tuple[float, str], ...]
    groups: tuple[Group, ...]
    stems: str
    dots: tuple[tuple[str, str], ...]
    hits: tuple[tuple[float, str], ...]
    step: float
    width: int
    height: int
    bottom: int
    left: int = LEFT
    top: int = TOP


@dataclass(frozen=True)
class RoleRows:
    """One role: words of its medians, and (layer, words) for each; words are four of activations, four of weights."""

    name: str
    medians: tuple[str, ...]
    layers: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class IncoherenceView:
    """Everything the page draws from incoherence.json."""

    charts: tuple[IncoherenceChart, ...]
    legend: tuple[tuple[str, str], ...]
    medians: tuple[str, ...]
    roles: tuple[RoleRows, ...]
    num_layers: int
    num_unseen: int
    source: str
    alpha: str

    @property
    def many(self) -> bool:
        return self.num_layers > MANY


def by_role(layers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Role -> its layers, each in the order of the network."""
    groups: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        groups.setdefault(layer["role"].replace("_", " "), {})[name] = layer
    return groups


def source_words(found: Mapping[str, Any]) -> str:
    """Which rows the activations' values are from."""
    prompts = f"{found['num_prompts']} {'prompt' if found['num_prompts'] == 1 else 'prompts'}"
    kind = "calibration" if found["stage"] == "calibrate" else "the diagnosis"
    return f"at most {found['max_rows']} input rows of each layer, kept during {kind} ({prompts}, all noise levels)"


def incoherence_view(found: Mapping[str, Any]) -> IncoherenceView:
    """Shape the content of incoherence.json."""
    groups = by_role(found["layers"])
    return IncoherenceView(
        charts=tuple(_chart(groups, side) for side in SIDES),
        legend=tuple(VARIANTS.items()),
        medians=_medians(found["layers"].values()),
        roles=tuple(
            RoleRows(role, _medians(members.values()), tuple((name, _words(layer)) for name, layer in members.items()))
            for role, members in groups.items()
        ),
        num_layers=len(found["layers"]),
        num_unseen=sum(layer["activation"] is None for layer in found["layers"].values()),
        source=source_words(found),
        alpha=three_digits(found["alpha"]),
    )


def _value(layer: Mapping[str, Any], side: str, variant: str) -> float | None:
    """None for a layer that was never called."""
    return None if layer[side] is None else float(layer[side][variant])


def _words(layer: Mapping[str, Any]) -> tuple[str, ...]:
    values = [_value(layer, side, variant) for side in SIDES for variant in VARIANTS]
    return tuple("–" if value is None else one_decimal(value) for value in values)


def _medians(layers: Any) -> tuple[str, ...]:
    """Of each variant, activations first."""
    seen = [layer for layer in layers if layer["activation"] is not None]
    each = [[layer[side][variant] for layer in seen] for side in SIDES for variant in VARIANTS]
    return tuple(one_decimal(median(values)) if values else "–" for values in each)


def one_decimal(value: float) -> str:
    """`5.0`; a column of them is easily compared."""
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def log_axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """(bottom, top, ticks) of a logarithmic axis that has room for `low` to `high` and holds two ticks at least."""
    steps = (1, 2, 3, 5, 7) if high < 20 * low else (1, 2, 5) if high < 1000 * low else (1,)
    ladder = [step * 10.0**power for power in range(floor(log10(low)) - 2, floor(log10(high)) + 3) for step in steps]
    bottom, top = low / ROOM, high * ROOM
    if sum(bottom <= tick <= top for tick in ladder) < 2:
        bottom, top = max(t for t in ladder if t <= low), min(t for t in ladder if t > high)
    return bottom, top, [tick for tick in ladder if bottom <= tick <= top]


def _chart(groups: Mapping[str, Mapping[str, Any]], side: str) -> IncoherenceChart:
    """Values of 0 (a tensor of zeros) have no place on a logarithmic axis and are left to the table."""
    layers = [(name, layer) for members in groups.values() for name, layer in members.items()]
    width = 560 if len(layers) <= MANY else 1072
    places = [[_value(layer, side, variant) or None for variant in VARIANTS] for _, layer in layers]
    known = [value for values in places for value in values if value] or [1.0]
    bottom, top, ticks = log_axis(min(known), max(known))
    height = HEIGHT if len(layers) <= MANY else HIGH
    gap = (width - LEFT - RIGHT) / max(len(layers) + len(groups) - 1, 1)  # one place is left empty between roles
    scale = (height - TOP - BOTTOM) / log10(top / bottom)

    def y_of(value: float) -> float:
        return round(TOP + log10(top / value) * scale, 1)

    xs, spans, at = [], [], LEFT + gap / 2
    for members in groups.values():
        spans.append((round(at - gap / 2, 1), round(at + gap * (len(members) - 0.5), 1)))
        xs += [round(at + gap * i, 1) for i in range(len(members))]
        at += gap * (len(members) + 1)
    rows = [[y_of(value) if value else None for value in values] for values in places]
    dots = [
        (css, "".join(f"M{x:g} {ys[i]:g}h0" for x, ys in zip(xs, rows, strict=True) if ys[i] is not None))
        for i, css in enumerate(VARIANTS.values())
    ]
    return IncoherenceChart(
        title=SIDES[side],
        description=f"Incoherence of the {SIDES[side].lower()} of each layer; the same numbers are in the table below",
        y_ticks=tuple((y_of(tick), three_digits(tick)) for tick in ticks),
        groups=tuple(_group(span, role) for span, role in zip(spans, groups, strict=True)),
        stems="".join(_stem(x, [y for y in ys if y is not None]) for x, ys in zip(xs, rows, strict=True)),
        dots=tuple(dots),
        hits=tuple((x, _hover(name, layer, side)) for x, (name, layer) in zip(xs, layers, strict=True)),
        step=round(gap, 2),
        width=width,
        height=height,
        bottom=height - BOTTOM,
    )


def _stem(x: float, ys: Sequence[float]) -> str:
    return f"M{x:g} {min(ys):g}V{max(ys):g}" if ys else ""


def _hover(name: str, layer: Mapping[str, Any], side: str) -> str:
    values = [(variant, _value(layer, side, variant)) for variant in VARIANTS]
    said = [f"{variant} {one_decimal(value)}" for variant, value in values if value is not None]
    return f"{name}: {', '.join(said) or 'never called'}"


def _group(span: tuple[float, float], role: str) -> Group:
    words = tuple(role.split())
    longest = max(map(len, words), default=0)
    room = span[1] - span[0]
    fits = "" if longest * PHONE_LETTER <= room else "roomy" if longest * LETTER <= room else None
    return Group(*span, words, fits)
