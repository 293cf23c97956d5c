"""The Pareto front against its definition, and labels that neither overlap nor leave the plot."""

import itertools
from pathlib import Path

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from viditq.report.pareto import Panel, Point, draw_points, numbered, pareto_front, pareto_picture, place_labels


def point(name: str, cost: float, value: float, error: float = 0.0) -> Point:
    return Point(name, cost, value, value - error, value + error)


def dominated(p: Point, points: list[Point], sign: int) -> bool:
    """Another is as good in both and better in one."""
    return any(
        q.cost <= p.cost and sign * q.value >= sign * p.value and (q.cost < p.cost or q.value != p.value)
        for q in points
    )


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_front_is_what_nothing_dominates(higher_is_better: bool) -> None:
    numbers = torch.randint(0, 12, (40, 2), generator=torch.Generator().manual_seed(0)).double()
    sign = 1 if higher_is_better else -1
    pairs = {(cost, value) for cost, value in numbers.tolist() if cost - sign * (value - 5.5) >= 4}  # no single winner
    points = [point(str(i), *pair) for i, pair in enumerate(sorted(pairs))]
    front = pareto_front(points, higher_is_better)
    assert {p.name for p in front} == {p.name for p in points if not dominated(p, points, sign)}
    assert [p.cost for p in front] == sorted(p.cost for p in front) and 1 < len(front) < 12


def test_labels_keep_clear_of_each_other() -> None:
    """Three bit-widths, four methods each a fraction of a decibel apart, as in a real ladder."""
    names = ("naive", "token", "smooth", "ts_smooth")
    points = [point(f"w{w}_{name}", w + 0.6, 6 * w + 0.3 * i, 0.4) for w in (4, 6, 8) for i, name in enumerate(names)]
    figure = Figure(figsize=(6.4, 6.4))
    canvas, axis = FigureCanvasAgg(figure), figure.subplots()
    draw_points(axis, Panel("bits", points), True)
    canvas.draw()
    place_labels(axis, Panel("bits", points), True, canvas)
    canvas.draw()
    labels = [child for child in axis.get_children() if isinstance(child, Annotation)]
    boxes = [super(Annotation, label).get_window_extent(canvas.get_renderer()) for label in labels]
    assert sorted(label.get_text() for label in labels) == sorted(p.name for p in points)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    frame = axis.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


def test_picture_is_written_twice_the_same(tmp_path: Path) -> None:
    panels = [Panel("bits", [point("a", 4, 30, 1), point("b", 8, 40)]), Panel("s", [])]
    paths = [pareto_picture(panels, "PSNR dB", True, "ranges", "m", tmp_path / name) for name in ("one", "two")]
    assert [path.suffix for path in paths[0]] == [".png", ".svg"]
    assert [path.read_bytes() for path in paths[0]] == [path.read_bytes() for path in paths[1]]


def test_long_names_stand_below_the_plots() -> None:
    points = [point("a", 4, 30), point("b with settings=[0.0, 0.5, 1.0]", 8, 40)]
    panels, key = numbered([Panel("bits", points), Panel("s", points[1:])])
    assert [[p.name for p in panel.points] for panel in panels] == [["1", "2"], ["2"]]
    assert key == ["1  a", "2  b with settings=[0.0, 0.5, 1.0]"]
    assert numbered([Panel("bits", points[:1])]) == ([Panel("bits", points[:1])], [])
