"""incoherence.json as charts, tables and a picture: the right values at the right places."""

import json
import re
from dataclasses import replace
from statistics import median

import numpy as np
import pytest
from page_examples import make_content, make_errors, make_incoherence
from PIL import Image

from viditq.report.incoherence import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MANY,
    TOP,
    VARIANTS,
    incoherence_view,
    log_axis,
)
from viditq.report.incoherence_picture import incoherence_picture
from viditq.report.page import render

FLAT = dict.fromkeys(VARIANTS, 6.0)


def found(num_blocks: int = 3) -> dict:
    errors = make_errors(num_blocks)
    return make_incoherence({name: layer["role"] for name, layer in errors["layers"].items()})


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"M([\d.]+) ([\d.]+)h0", path)]


def one(**values: float) -> dict:
    layers = {"a": {"role": "mlp", "activation": {**FLAT, **values}, "weight": FLAT}}
    return {"stage": "diagnose", "num_prompts": 1, "max_rows": 20, "alpha": 0.5, "layers": layers}


@pytest.mark.parametrize(
    ("low", "high"), [(6.0, 6.0), (5.9, 6.1), (5.1, 17.2), (4.7, 48.0), (1.0, 900.0), (1.0, 1e6), (9.99, 10.01)]
)
def test_the_axis_holds_the_values_and_a_few_ticks(low, high):
    bottom, top, ticks = log_axis(low, high)
    assert bottom <= low and high <= top and bottom < top
    assert 2 <= len(ticks) <= 10 and ticks == sorted(set(ticks)) and bottom <= ticks[0] and ticks[-1] <= top


def test_dots_are_at_their_values_on_a_logarithmic_axis():
    chart = incoherence_view(one(raw=40.0, both=5.0)).charts[0]
    ys = {label: y for y, label in chart.y_ticks}
    values = {css: points(path)[0][1] for css, path in chart.dots}
    assert values["c2"] == ys["5"]
    assert values["whole"] - ys["20"] == pytest.approx(ys["20"] - ys["10"], abs=0.15), "40 / 20 = 20 / 10"
    assert TOP <= values["whole"] < values["c2"] <= HEIGHT - BOTTOM
    assert chart.stems == f"M{points(chart.dots[0][1])[0][0]:g} {values['whole']:g}V{values['c2']:g}"
    assert chart.hits[0][1] == "a: raw 40.0, scaled 6.0, rotated 6.0, both 5.0"


def test_roles_stand_together_in_the_order_of_the_network():
    content = found()
    view = incoherence_view(content)
    chart = view.charts[0]
    assert [" ".join(group.words) for group in chart.groups] == [role.name for role in view.roles]
    assert [role.name for role in view.roles][:2] == ["spatial attention", "cross attention"]
    names = [name for role in view.roles for name, _ in role.layers]
    assert sorted(names) == sorted(content["layers"]) and [hit[1].split(": ")[0] for hit in chart.hits] == names
    for group, role in zip(chart.groups, view.roles, strict=True):
        inside = [x for x, words in chart.hits if words.split(": ")[0] in dict(role.layers)]
        assert len(inside) == len(role.layers) and all(group.left < x < group.right for x in inside)
    assert chart.groups[0].left == LEFT and chart.groups[0].right < chart.groups[1].left
    assert [name.split(".")[1] for name, _ in view.roles[0].layers] == sorted("012" * 4)


def test_medians_and_values_as_words():
    content = found()
    view = incoherence_view(content)
    raw = [layer["activation"]["raw"] for layer in content["layers"].values() if layer["activation"]]
    assert view.medians[0] == f"{median(raw):.1f}"
    name, words = view.roles[0].layers[0]
    layer = content["layers"][name]
    assert words == tuple(f"{layer[side][v]:.1f}" for side in ("activation", "weight") for v in VARIANTS)


def test_a_layer_that_was_never_called_stays_empty():
    view = incoherence_view(found())
    assert view.num_unseen == 1
    assert view.roles[-1].layers[-1][1] == ("–",) * 8
    assert view.charts[0].hits[-1][1].endswith("never called")
    assert {len(points(path)) for _, path in view.charts[0].dots} == {view.num_layers - 1}


def test_zeros_and_nothing_at_all_are_drawn():
    content = one(raw=0.0, scaled=0.0, rotated=0.0, both=0.0)
    assert not any(path for _, path in incoherence_view(content).charts[0].dots)
    content["layers"]["a"].update(activation=None, weight=None)
    view = incoherence_view(content)
    assert view.medians == ("–",) * 8 and view.charts[0].stems == ""


def test_many_layers_get_a_wider_chart():
    few, many = incoherence_view(found()), incoherence_view(found(num_blocks=20))
    assert few.num_layers <= MANY < many.num_layers and few.charts[0].width < many.charts[0].width
    assert not few.many and many.many


def test_words_that_do_not_fit_their_role_are_left_out():
    content = found(num_blocks=20)
    content["layers"]["a"] = {**next(iter(content["layers"].values())), "role": "text_refiner"}
    assert [group.fits for group in incoherence_view(content).charts[0].groups][-1] is None


@pytest.mark.parametrize("num_blocks", [1, 20])
def test_the_picture_is_drawn(num_blocks, tmp_path):
    path = incoherence_picture(found(num_blocks), tmp_path / "incoherence.png", "w4a8")
    pixels = np.array(Image.open(path).convert("RGB")).reshape(-1, 3)
    for color in ((0xBD, 0x5F, 0x22), (0x2B, 0x5C, 0xC4), (0x1B, 0x7A, 0x5E)):
        assert (np.abs(pixels.astype(int) - color).sum(1) < 6).sum() > 50
    assert [p.name for p in tmp_path.iterdir()] == ["incoherence.png"]
    content = one()
    content["layers"]["a"].update(activation=None, weight=None)
    incoherence_picture(content, path, "nothing")


def test_the_page_shows_it():
    content = make_content(count=1, num_frames=1)
    page = render(content)
    assert 'id="incoherence"' in page and 'href="#incoherence"' in page
    view = incoherence_view(content.incoherence)
    for _, path in view.charts[0].dots + view.charts[1].dots:
        assert path in page
    assert "at most 160 input rows of each layer, kept during calibration (16 prompts, all noise levels)" in page
    assert "Without values: 1 layer that was never called" in page
    assert 'id="incoherence"' not in render(replace(content, incoherence=None))
    diagnosed = json.loads(json.dumps(content.incoherence)) | {"stage": "diagnose", "num_prompts": 1}
    assert "kept during the diagnosis (1 prompt," in render(replace(content, incoherence=diagnosed))
