"""errors.json as charts and tables: the right values at the right places."""

import copy
import json

import pytest
from page_examples import EDGES, ROLES, make_errors, make_plan

from viditq.report.charts import LEFT, RIGHT, TOP, WIDTH, Series, Shades, level_chart
from viditq.report.diagnosis import MAX_WORST, diagnose
from viditq.report.plan_view import segment_words, summarize_plan


def test_noise_level_one_is_at_the_left_and_empty_buckets_are_skipped():
    chart = level_chart([0, 0.25, 0.5, 1], [Series([1.0, None, 3.0], "c0")], "d", str, cuts=[0, 0.5, 1])
    width = WIDTH - LEFT - RIGHT
    xs = [x for x, _ in chart.lines[0].dots]
    assert xs == [pytest.approx(LEFT + 0.25 * width, abs=0.1), pytest.approx(LEFT + 0.875 * width, abs=0.1)]
    ys = [y for _, y in chart.lines[0].dots]
    assert ys[0] < ys[1], "3 is drawn above 1"
    assert ys[0] >= TOP and chart.y_ticks[0][1] == "0.0", "zero is in sight"
    assert chart.cuts == (pytest.approx(LEFT + 0.5 * width, abs=0.1),)


def test_a_chart_without_values_is_none():
    assert level_chart([0, 1], [Series([None], "c0")], "d", str) is None


def test_shades_are_linear_and_one_outlier_hides_nothing():
    shades = Shades.of([*(i / 100 for i in range(100)), 50.0])
    assert shades.exceeded and shades.top == 0.99
    assert [shades.step(v) for v in (0, 0.5, 0.98, 50)] == [0, 5, 9, 9]
    assert Shades.of([]).step(0.0) == 0 and Shades.of([0.0]).step(0.0) == 0


def test_strips_run_from_noise_level_one_and_fill_gaps_with_the_nearest():
    shades = Shades(1.0, False)
    strip = dict(shades.strip([0.05, None, None, 0.95]))
    assert strip[9].startswith("M0 0") and "M1 0" in strip[9]
    assert "M2 0" in strip[0] and "M3 0" in strip[0]
    assert shades.strip([None, None]) == ()


def test_roles_worst_layers_and_means():
    errors = make_errors(num_blocks=3)
    found = diagnose(errors, EDGES)
    totals = {name: layer["total"] for name, layer in errors["layers"].items()}
    assert [row.name for row in found.worst] == sorted(totals, key=lambda n: -totals[n])[:MAX_WORST]
    assert found.worst[0].bar == 100
    assert [role.name for role in found.roles] == list(ROLES)
    assert [len(role.layers) for role in found.roles] == [3 * n for n in ROLES.values()]
    mlp = found.roles[-1]
    values = [totals[row.name] for row in mlp.layers]
    assert mlp.mean.total == f"{100 * sum(values) / len(values):#.3g} %"
    assert mlp.layers[0].bits == "W4/8 A8" and mlp.layers[1].bits == "W4 A8"
    assert found.num_layers == len(totals) and len(found.reached) == 12 and len(found.buckets) == 20
    assert (found.buckets[0], found.buckets[-1]) == ("0.95–1", "0–0.05")


def test_ranges_of_a_role_span_its_layers():
    errors = make_errors(num_blocks=2)
    found = diagnose(errors)
    role = found.roles[0]
    last = errors["bucket_edges"].index(0.95)
    highs = [layer["maximum"][last] for layer in errors["layers"].values() if layer["role"] == role.name]
    bucket, _, highest = role.range.rows[0]
    assert bucket == "0.95–1" and float(highest) == pytest.approx(max(highs), rel=5e-3)
    assert [panel.name for panel in role.layer_ranges] == [row.name for row in role.layers]
    assert len(role.layer_ranges[0].chart.lines) == 2 and len(role.range.chart.lines) == 2 * len(role.layers)


def test_empty_buckets_and_layers_are_no_error():
    errors = copy.deepcopy(make_errors(num_blocks=1))
    layer = next(iter(errors["layers"].values()))
    empty = [None] * 20
    layer.update(total=None, relative_error=empty, minimum=empty, maximum=empty, amax=empty, role=None)
    errors["denoiser"]["relative_error"] = empty
    found = diagnose(json.loads(json.dumps(errors)))
    other = next(role for role in found.roles if role.name == "other")
    assert (other.layers[0].total, other.range, other.layers[0].strip) == ("–", None, ())
    nothing = diagnose({**errors, "layers": {}})
    assert nothing.num_layers == 0 and nothing.error_chart is None and not nothing.has_ranges


def test_the_plan_by_role():
    layers = ["a.to_0", "a.to_1", "b.to_1"]
    plan = summarize_plan(make_plan(layers), {"a.to_0": "attn", "a.to_1": "attn", "b.to_1": "mlp", "out": "float"})
    attn, mlp, rest = plan
    assert (attn.num_linears, attn.weight_bits, attn.activation_bits) == (2, (4, 6), (8, 8))
    assert attn.schemes == (("w4a8",), ("w8a8", "w4a8"))
    assert mlp.schemes == (("w4a8",), ("w4a8",))
    assert (rest.weight_bits, rest.schemes) == ((16, 16), (("float",), ("float",)))
    assert segment_words(EDGES) == ("0–0.5", "0.5–1")
