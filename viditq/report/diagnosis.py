"""errors.json as charts and tables: the error of each layer and the range of its inputs, over the noise level."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from viditq.report.charts import Chart, Levels, Series, Shades, level_chart
from viditq.report.wording import percent, percent_tick, three_digits

MAX_WORST = 12
NUM_COLORS = 6
ERROR_TITLE = (
    "Relative error of the quantized denoiser's output, and the mean over the layers of each role, by noise level"
)


@dataclass(frozen=True)
class Row:
    """The error of one layer, or the mean over the layers of one role.

    `bar` is its length in per cent of the longest; `strip` and `cells` (step of colour or None, words) run from noise
    level 1 to 0.
    """

    name: str
    css: str
    bits: str
    total: str
    bar: float
    strip: tuple[tuple[int, str], ...]
    cells: tuple[tuple[int | None, str], ...]


@dataclass(frozen=True)
class RangePanel:
    """The range of the inputs of one layer, or of all layers of one role; `rows` are (noise level, lowest, highest)."""

    name: str
    css: str
    chart: Chart
    rows: tuple[tuple[str, str, str], ...]
    change: str


@dataclass(frozen=True)
class Role:
    """All layers of one role, in the order of the network."""

    name: str
    css: str
    mean: Row
    layers: tuple[Row, ...]
    range: RangePanel | None
    layer_ranges: tuple[RangePanel, ...]


@dataclass(frozen=True)
class Diagnosis:
    """Everything the page draws from errors.json.

    `buckets` are words, from noise level 1 to 0; `reached` are the positions in it that sampling reaches.
    """

    num_prompts: int
    num_layers: int
    reached: tuple[int, ...]
    buckets: tuple[str, ...]
    error_chart: Chart | None
    error_series: tuple[tuple[str, tuple[str, ...]], ...]
    roles: tuple[Role, ...]
    worst: tuple[Row, ...]
    shades: Shades

    @property
    def has_ranges(self) -> bool:
        return any(role.range for role in self.roles)


def diagnose(errors: Mapping[str, Any], segment_edges: Sequence[float] = ()) -> Diagnosis:
    """Shape errors.json; `segment_edges` (noise levels) appear as vertical lines."""
    edges, layers = errors["bucket_edges"], {name: _Layer(name, **fields) for name, fields in errors["layers"].items()}
    by_role: dict[str, list[_Layer]] = {}
    for layer in layers.values():
        by_role.setdefault(layer.role or "other", []).append(layer)
    colors = {role: f"c{i % NUM_COLORS}" for i, role in enumerate(by_role)}
    shades = Shades.of([v for layer in layers.values() for v in layer.relative_error if v is not None])
    longest = max((layer.total for layer in layers.values() if layer.total is not None), default=0.0)
    roles, worst = [], []
    for role, members in by_role.items():
        css = colors[role]
        rows = {m.name: _row(m.name, css, m.bits, m.total, m.relative_error, shades, longest) for m in members}
        worst += [(m.total, rows[m.name]) for m in members if m.total is not None]
        total = _mean([m.total for m in members])
        mean = _row(
            role.replace("_", " "), css, "", total, _means([m.relative_error for m in members]), shades, longest
        )
        ranges = [_range(m.name, css, [m], edges, segment_edges) for m in members]
        role_range = _range(role, css, members, edges, segment_edges)
        roles.append(Role(role, css, mean, tuple(rows.values()), role_range, tuple(r for r in ranges if r)))
    lines = [Series(_means([m.relative_error for m in group]), colors[r], r) for r, group in by_role.items()]
    lines.append(Series(errors["denoiser"]["relative_error"], "whole", "whole denoiser"))
    worst.sort(key=lambda pair: -pair[0])
    every = [*(layer.relative_error for layer in layers.values()), errors["denoiser"]["relative_error"]]
    found = [any(v is not None for v in values) for values in zip(*every, strict=True)]
    return Diagnosis(
        num_prompts=errors["num_prompts"],
        num_layers=len(layers),
        reached=tuple(i for i, any_value in enumerate(reversed(found)) if any_value),
        buckets=tuple(reversed(bucket_words(edges))),
        error_chart=level_chart(edges, lines, ERROR_TITLE, percent_tick, cuts=segment_edges),
        error_series=tuple((s.label, tuple(percent(v) for v in reversed(s.values))) for s in lines),
        roles=tuple(roles),
        worst=tuple(row for _, row in worst[:MAX_WORST]),
        shades=shades,
    )


@dataclass(frozen=True)
class _Layer:
    """One entry of errors.json; lists have one value per bucket, noise level 0 first."""

    name: str
    role: str | None
    weight_bits: list[int]
    activation_bits: list[int]
    relative_error: list[float | None]
    total: float | None
    minimum: list[float | None]
    maximum: list[float | None]
    amax: list[float | None]

    @property
    def bits(self) -> str:
        return f"W{_each(self.weight_bits)} A{_each(self.activation_bits)}"


def _each(bits: Sequence[int]) -> str:
    """`4` where all segments agree, else `4/8` segment by segment."""
    return "/".join(str(b) for b in (bits if len(set(bits)) > 1 else bits[:1]))


def bucket_words(edges: Sequence[float]) -> list[str]:
    """`0.95–1` for each bucket, in the order of the edges."""
    return [f"{low:.3g}–{high:.3g}" for low, high in pairwise(edges)]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return fmean(known) if known else None


def _means(lists: Sequence[Levels]) -> list[float | None]:
    """Bucket by bucket."""
    return [_mean(values) for values in zip(*lists, strict=True)]


def _row(name: str, css: str, bits: str, total: float | None, levels: Levels, shades: Shades, longest: float) -> Row:
    cells = tuple((None if v is None else shades.step(v), percent(v)) for v in reversed(levels))
    bar = round(100 * total / longest, 2) if total and longest else 0.0
    return Row(name, css, bits, percent(total), bar, shades.strip(levels), cells)


def _range(
    name: str, css: str, members: Sequence[_Layer], edges: Sequence[float], cuts: Sequence[float]
) -> RangePanel | None:
    """Lowest and highest input of some layers, each as thin lines where there are several; None without values."""
    low = [_outermost(min, values) for values in zip(*(m.minimum for m in members), strict=True)]
    high = [_outermost(max, values) for values in zip(*(m.maximum for m in members), strict=True)]
    series = [Series(low, css), Series(high, css)]
    if len(members) > 1:
        series = [Series(v, f"{css} thin", thin=True) for m in members for v in (m.minimum, m.maximum)]
    chart = level_chart(
        edges, series, f"Range of the inputs of {name} by noise level", three_digits, [(low, high, css)], cuts
    )
    if chart is None:
        return None
    rows = zip(bucket_words(edges), low, high, strict=True)
    words = [(bucket, three_digits(a), three_digits(b)) for bucket, a, b in rows if a is not None and b is not None]
    changes = [max(known) / min(known) for m in members if (known := [a for a in m.amax if a])]
    change = f"{three_digits(fmean(changes))} times" if changes else "–"
    return RangePanel(name, css, chart, tuple(reversed(words)), change)


def _outermost(pick: Callable[[Iterable[float]], float], values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return pick(known) if known else None
