"""Quality against cost: points with error bars, the Pareto front, labels that keep clear of each other."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from viditq.files import atomic

INK, GREY, FRONT = "#1c1e21", "#8a9097", "#0b57d0"
ANGLES = [(1, 0), (1, 1), (1, -1), (0, 1), (0, -1), (-1, 0), (-1, 1), (-1, -1)]  # where a label may lie, best first
LONGEST = 24  # letters of a name that may stand in a plot; with a longer one, numbers do, explained below
LEGEND = [
    Line2D([], [], color=FRONT, marker="o", markersize=5, lw=1.4, label="Pareto front: none is better in both"),
    Line2D([], [], color=GREY, marker="o", markersize=5, lw=0, label="others"),
]
DISTANCES = [6, 14, 24, 36, 50, 66, 84, 104]  # from its point, in points of 1/72 inch


@dataclass(frozen=True)
class Point:
    """One configuration: cost (less is better), quality with the ends of its error bar."""

    name: str
    cost: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Panel:
    """One plot of quality against a cost."""

    cost: str
    points: Sequence[Point]


def pareto_front(points: Sequence[Point], higher_is_better: bool) -> list[Point]:
    """The points that no other beats in cost or quality without being worse in the other, cheapest first."""
    sign = 1 if higher_is_better else -1
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -sign * p.value)):
        if not front or sign * point.value > sign * front[-1].value:
            front.append(point)
    return front


def pareto_picture(
    panels: Sequence[Panel], quality: str, higher_is_better: bool, bars: str, title: str, path: Path
) -> list[Path]:
    """Panels side by side; writes `path` as .png and .svg and returns both. bars: what error bars span.

    Where a name is too long for a plot, points are numbered in the order of the first panel and named below.
    """
    panels, key = numbered(panels)
    with matplotlib.rc_context({"font.size": 9, "svg.hashsalt": "viditq", "svg.fonttype": "path"}):
        figure = Figure(figsize=(6.4 * len(panels), 6.6 + 0.18 * len(key)), layout="constrained")
        canvas = FigureCanvasAgg(figure)
        figure.supxlabel("\n".join([*key, f"Bars: {bars}."]), x=0.01, ha="left", fontsize=8.5, color=INK)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
        figure.legend(handles=LEGEND, loc="outside upper right", ncols=2, frameon=False)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=True):
            draw_points(axis, panel, higher_is_better)
            axis.set_xlabel(f"{panel.cost} (lower is better)")
        axes[0].set_ylabel(f"{quality} ({'higher' if higher_is_better else 'lower'} is better)")
        canvas.draw()  # fixes the layout, so that labels can be placed in pixels
        for axis, panel in zip(axes, panels, strict=True):
            place_labels(axis, panel, higher_is_better, canvas)
        return save_both(figure, path)


def save_both(figure: Figure, path: Path) -> list[Path]:
    """Write `path` as .png and .svg; returns both."""
    paths = [path.with_name(f"{path.name}.{kind}") for kind in ("png", "svg")]
    for file in paths:
        with atomic(file) as temporary:
            kind = file.suffix[1:]
            figure.savefig(temporary, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else None)
    return paths


def numbered(panels: Sequence[Panel]) -> tuple[Sequence[Panel], list[str]]:
    """The panels with numbers for names, and what they stand for; as they are if all names are short."""
    names = list(dict.fromkeys(point.name for panel in panels for point in panel.points))
    if not names or max(map(len, names)) <= LONGEST:
        return panels, []
    number = {name: str(i) for i, name in enumerate(names, 1)}
    short = [Panel(p.cost, [replace(point, name=number[point.name]) for point in p.points]) for p in panels]
    return short, [f"{i}  {name}" for name, i in number.items()]


def draw_points(axis: Axes, panel: Panel, higher_is_better: bool) -> None:
    """Error bars, points, and the front as steps: what can be had up to a cost."""
    front = pareto_front(panel.points, higher_is_better)
    names = {point.name for point in front}
    for point in sorted(panel.points, key=lambda p: p.name in names):  # the front on top
        colour = FRONT if point.name in names else GREY
        bars = [[max(point.value - point.low, 0)], [max(point.high - point.value, 0)]]
        axis.errorbar(point.cost, point.value, yerr=bars, color=colour, marker="o", markersize=5, capsize=2.5, lw=1)
    axis.step([p.cost for p in front], [p.value for p in front], where="post", color=FRONT, lw=1.4, alpha=0.5)
    axis.margins(x=0.22, y=0.14)
    axis.grid(color="#e8eaed", lw=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def place_labels(axis: Axes, panel: Panel, higher_is_better: bool, canvas: FigureCanvasAgg) -> None:
    """Each name as near its point as it fits beside points, bars and earlier labels; a line leads to far ones."""
    names = {point.name for point in pareto_front(panel.points, higher_is_better)}
    renderer, inside = canvas.get_renderer(), axis.get_window_extent()
    scale = canvas.figure.dpi / 72
    taken: list[Bbox] = []
    for point in panel.points:
        (x, y), (_, low), (_, high) = axis.transData.transform([(point.cost, v) for v in heights(point)])
        taken += [Bbox.from_extents(x - 4, y - 4, x + 4, y + 4), Bbox.from_extents(x - 2, low, x + 2, high)]
    taken += front_boxes(axis, pareto_front(panel.points, higher_is_better))
    for point in sorted(panel.points, key=lambda p: (p.name not in names, p.cost, p.value)):
        text = axis.annotate(
            point.name,
            (point.cost, point.value),
            (0, 0),
            textcoords="offset points",
            fontsize=8,
            color=FRONT if point.name in names else INK,
            arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.5, "shrinkA": 0, "shrinkB": 3},
        )
        text.set_in_layout(False)
        size = text.get_window_extent(renderer)
        x, y = axis.transData.transform((point.cost, point.value))
        offsets = label_offsets(size.width / scale, size.height / scale)
        boxes = [Bbox.from_bounds(x + scale * dx, y + scale * dy, size.width, size.height) for dx, dy in offsets]
        hits = [sum(map(box.overlaps, taken)) + 100 * (not within(box, inside)) for box in boxes]
        best = hits.index(min(hits))
        text.set_position(offsets[best])
        if text.arrow_patch is not None:
            text.arrow_patch.set_visible(best >= len(ANGLES))
        taken.append(boxes[best])


def front_boxes(axis: Axes, front: Sequence[Point]) -> list[Bbox]:
    """Thin boxes around the steps of the drawn front."""
    corners = axis.transData.transform([(point.cost, point.value) for point in front])
    boxes = []
    for (x, y), (next_x, next_y) in pairwise(corners):
        boxes += [Bbox.from_extents(x, y - 1, next_x, y + 1)]
        boxes += [Bbox.from_extents(next_x - 1, min(y, next_y), next_x + 1, max(y, next_y))]
    return boxes


def heights(point: Point) -> tuple[float, float, float]:
    """A point and the ends of its error bar."""
    return point.value, point.low, point.high


def label_offsets(width: float, height: float) -> list[tuple[float, float]]:
    """Where the lower left corner of a label may lie, seen from its point; nearest first."""
    offsets = []
    for distance in DISTANCES:
        for right, up in ANGLES:
            reach = 0.75 * distance if right and up else distance
            x = reach if right > 0 else -reach - width if right < 0 else -width / 2
            y = reach * up - height / 2 if right else (reach if up > 0 else -reach - height)
            offsets.append((x, y))
    return offsets


def within(box: Bbox, frame: Bbox) -> bool:
    """True if `box` lies inside `frame`."""
    return frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
