"""Geometry of the page's line charts over the noise level; the template draws them as SVG.

x runs from noise level 1 (pure noise, where sampling starts) at the left to 0 (clean) at the right. Units of the view
box, y downwards. Colours are CSS classes, so that a chart follows the light or dark mode of its reader.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 14, 44
Levels = Sequence[float | None]
"""One value per bucket; None where no sampling step reaches it."""


@dataclass(frozen=True)
class Line:
    """A line through the buckets that sampling reaches; `points` as SVG writes them, `dots` one by one."""

    points: str
    dots: tuple[tuple[float, float], ...]
    css: str
    label: str = ""


@dataclass(frozen=True)
class Chart:
    """One chart; `bands` are polygons (points, css), `cuts` the x of segment boundaries."""

    description: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    lines: tuple[Line, ...]
    bands: tuple[tuple[str, str], ...] = ()
    cuts: tuple[float, ...] = ()
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True)
class Series:
    """Values per bucket with the CSS class of their line; a thin line has no dots."""

    values: Levels
    css: str
    label: str = ""
    thin: bool = False


def centers(edges: Sequence[float]) -> list[float]:
    """Middle noise level of each bucket."""
    return [(low + high) / 2 for low, high in pairwise(edges)]


def level_chart(
    edges: Sequence[float],
    series: Sequence[Series],
    description: str,
    write: Callable[[float], str],
    bands: Sequence[tuple[Levels, Levels, str]] = (),
    cuts: Sequence[float] = (),
) -> Chart | None:
    """A chart of `series` and of `bands` (lower values, upper values, css); None if there is no value at all.

    `edges` are the bucket edges, `cuts` the segment edges (noise levels), `write` words a tick of the y axis. Zero is
    always in sight.
    """
    values = [v for s in series for v in s.values if v is not None]
    values += [v for low, high, _ in bands for v in [*low, *high] if v is not None]
    if not values:
        return None
    ticks = [
        float(t)
        for t in MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3).tick_values(
            min(0.0, *values), max(0.0, *values)
        )
    ]
    x_of, y_of = _x_of, _y_of(ticks[0], ticks[-1])
    middles = centers(edges)

    def points(levels: Levels) -> list[tuple[float, float]]:
        places = [(x_of(m), y_of(v)) for m, v in zip(middles, levels, strict=True) if v is not None]
        return sorted(places)

    lines = [Line(_svg(points(s.values)), () if s.thin else tuple(points(s.values)), s.css, s.label) for s in series]
    polygons = [(_svg([*points(high), *reversed(points(low))]), css) for low, high, css in bands]
    return Chart(
        description=description,
        x_ticks=tuple((x_of(level / 4), f"{level / 4:g}") for level in range(5)),
        y_ticks=tuple((y_of(t), write(t)) for t in ticks),
        lines=tuple(line for line in lines if line.points),
        bands=tuple(polygons),
        cuts=tuple(x_of(cut) for cut in cuts if 0 < cut < 1),
    )


def _x_of(level: float) -> float:
    return round(LEFT + (1 - level) * (WIDTH - LEFT - RIGHT), 1)


def _y_of(low: float, high: float) -> Callable[[float], float]:
    scale = (HEIGHT - TOP - BOTTOM) / (high - low or 1)
    return lambda value: round(TOP + (high - value) * scale, 1)


def _svg(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


NUM_SHADES = 10


@dataclass(frozen=True)
class Shades:
    """Ten steps of colour from 0 to `top`, linear; `top` is the 98th percentile, so that one outlier hides nothing."""

    top: float
    exceeded: bool

    @classmethod
    def of(cls, values: Sequence[float]) -> "Shades":
        """Fitted to all values of a page."""
        ordered = sorted(values)
        top = ordered[min(round(0.98 * len(ordered)), len(ordered) - 1)] if ordered else 0.0
        return cls(top, bool(ordered) and ordered[-1] > top)

    def step(self, value: float) -> int:
        """0 (pale) .. 9 (strong)."""
        return min(int(NUM_SHADES * value / self.top), NUM_SHADES - 1) if self.top else 0

    def strip(self, levels: Levels) -> tuple[tuple[int, str], ...]:
        """(step, SVG path of its cells) for a strip one unit high, one unit per bucket, noise level 1 at the left.

        A bucket that no sampling step reaches takes the colour of the nearest one that is reached.
        """
        known = [i for i, value in enumerate(levels) if value is not None]
        cells: dict[int, str] = {}
        for x in range(len(levels) if known else 0):
            bucket = len(levels) - 1 - x
            _, nearest = min((abs(i - bucket), i) for i in known)
            value = levels[nearest]
            assert value is not None
            cells[self.step(value)] = cells.get(self.step(value), "") + f"M{x} 0h1.02v1h-1.02z"
        return tuple(sorted(cells.items()))
