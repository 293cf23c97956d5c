"""Heat map, budget curve and the page's section of a sensitivity search."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_examples import make_content
from PIL import Image

from viditq.report.budget_curve import axis_label, budget_curve_picture, curve_table, decibels, spent
from viditq.report.heat_map import chosen_bits, heat_map_picture, panels, segment_labels
from viditq.report.page import render
from viditq.report.search_view import search_view

GROUPS = [("blocks.0", "mlp"), ("blocks.0", "cross_attention"), ("blocks.<b>1</b>", "mlp")]
WIDTHS = {"weight": (4, 8), "activation": (8,)}


def cost(group: int, segment: int, bits: int) -> float:
    return (1 + group) * (1 + segment) * 4.0**-bits


def point(bits: float) -> dict[str, float]:
    return {"weight_bits": bits, "activation_bits": 8.0, "size_bytes": bits * 100, "predicted": 4.0**-bits}


@pytest.fixture
def found() -> dict[str, Any]:
    """search.json of three parts in two segments."""
    groups = [{"name": f"{block}/{role}", "block": block, "role": role} for block, role in GROUPS]
    candidates = [
        {"group": g["name"], "segment": s, "side": side, "bits": b, "output": cost(i, s, b), "metric": 0.0}
        | {"proxy": 1.0, "measured": b == 4}
        for side, widths in WIDTHS.items()
        for b in widths
        for i, g in enumerate(groups)
        for s in (0, 1)
    ]
    bits = [[g["name"], s, 4 if i == 0 else 8, 8] for i, g in enumerate(groups) for s in (0, 1)]
    return {
        "edges": [0.0, 0.7, 1.0],
        "prompts": 4,
        "budget": {"weight_bits": 7.0, "size_bytes": None},
        "used": {"weight_bits": 6.7, "activation_bits": 8.0, "size_bytes": 12345.0},
        "predicted": 1e-4,
        "groups": groups,
        "candidates": candidates,
        "bits": bits,
        "predicted_curve": [point(b) for b in (4.0, 6.0, 8.0)],
        "curve": [],
    }


def test_panels_show_sampling_from_left_to_right(found: dict[str, Any]) -> None:
    drawn = panels(found)
    assert set(drawn) == {("weight", 4), ("weight", 8), ("activation", 8)}
    for (_, bits), panel in drawn.items():
        assert panel.shape == (3, 2)
        for group in range(3):
            assert panel[group].tolist() == [cost(group, 1, bits), cost(group, 0, bits)]
    assert segment_labels(found["edges"]) == ["1–0.7", "0.7–0"]
    assert chosen_bits(found)["weight"].tolist() == [[4, 4], [8, 8], [8, 8]]


@pytest.mark.parametrize("flat", [False, True])
def test_heat_map_is_drawn(found: dict[str, Any], flat: bool, tmp_path: Path) -> None:
    for c in found["candidates"] if flat else []:
        c["output"] = 0.0
    pixels = np.array(Image.open(heat_map_picture(found, tmp_path / "map.png")).convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]


def test_budget_curve(found: dict[str, Any], tmp_path: Path) -> None:
    curve = [{**point(b), "measured": 2 * 4.0**-b} for b in (6.0, 4.0, 5.0)]
    lines = curve_table(found, curve).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["4.00", "5.00", "6.00"]
    assert "24.08" in lines[2] and "21.07" in lines[2]  # -10 log10(1 / 256), and half of it
    measured = Image.open(budget_curve_picture({**found, "curve": curve}, tmp_path / "measured.png"))
    predicted = Image.open(budget_curve_picture(found, tmp_path / "curve.png"))
    assert predicted.width > 300 and measured.tobytes() != predicted.tobytes()
    assert decibels(1e-3) == pytest.approx(30) and decibels(0) == 100


def test_bare_proxies_are_no_errors_of_pixels(found: dict[str, Any], tmp_path: Path) -> None:
    for c in found["candidates"]:
        c["measured"] = False
    curve = [{**point(b), "measured": 2 * 4.0**-b} for b in (6.0, 4.0)]
    assert "sum of proxies" in curve_table(found, curve) and "| 3.91e-03 | 21.07 |" in curve_table(found, curve)
    alone = Image.open(budget_curve_picture(found, tmp_path / "alone.png"))
    assert alone.tobytes() != Image.open(budget_curve_picture({**found, "curve": curve}, tmp_path / "c.png")).tobytes()
    view = search_view(found, heat_map_picture(found, tmp_path / "map.png"), tmp_path / "alone.png")
    assert view.predicted == "1.00e-04 (sum of proxies, no unit)" and view.points[0] == ("4", "3.91e-03")
    page = render(replace(make_content(), search=found, heat_map=tmp_path / "map.png", budget_curve=tmp_path / "c.png"))
    section = page[page.index('<section id="sensitivity"') : page.index("<h3>Budget</h3>")]
    section = re.sub(r"data:image/png;base64,[^\"]*", "", section)
    assert "proxy of the error (no unit)" in section and "mean square error" not in section and "dB" not in section


@pytest.mark.parametrize(
    ("budget", "at", "label"),
    [
        ({"weight_bits": 7.0, "size_bytes": 1.0}, 6.7, "average bits of weights"),
        ({"weight_bits": 7.0, "activation_bits": 8.0}, 7.35, "average bits of weights and activations"),
        ({"weight_bits": None, "size_bytes": 9e4}, 0.012345, "weights, MB"),
        ({"latency": 0.7, "latency_costs": {"w8a8": 0.5}}, 0.6, "latency, float = 1"),
    ],
)
def test_the_axis_is_what_the_budget_limits(found: dict[str, Any], budget: dict, at: float, label: str) -> None:
    search = {**found, "budget": budget, "used": {**found["used"], "latency": 0.6}}
    assert spent(search, search["used"]) == pytest.approx(at) and axis_label(search) == label


def test_the_page_shows_it_and_escapes_names(found: dict[str, Any], tmp_path: Path) -> None:
    picture = heat_map_picture(found, tmp_path / "map.png")
    view = search_view(found, picture)
    assert (view.num_measured, view.num_candidates) == (6, 18) and view.predicted == "40.0 dB"
    assert view.parts[0].name == "blocks.<b>1</b>/mlp" and view.parts[0].how == "measured"
    assert ("weight bits", "6.7", "7") in view.used and ("size", "12.3 kB", "–") in view.used
    curve = budget_curve_picture(found, tmp_path / "curve.png")
    assert search_view(found, picture, curve).points == (("4", "24.1"), ("6", "36.1"), ("8", "48.2"))
    page = render(replace(make_content(), search=found, heat_map=picture, budget_curve=curve))
    assert "Quality against the budget" in page and '<td class="n">48.2</td>' in page
    assert "blocks.&lt;b&gt;1&lt;/b&gt;/mlp" in page and "data:image/png;base64," in page and 'id="sensitivity"' in page
    assert 'id="sensitivity"' not in render(make_content())
