import json

import pytest

from viditq.errors import UserError
from viditq.quant import LayerScheme, QuantPlan, QuantSpec, Recipe
from viditq.quant.description.plan import check_edges
from viditq.quant.description.policy import PlanFile

W4A8 = LayerScheme(QuantSpec(4, granularity="channel"), QuantSpec(8, granularity="token", dynamic=True))
W8 = LayerScheme(QuantSpec(8, granularity="channel"), None)


def plan() -> QuantPlan:
    return QuantPlan((0, 0.25, 1), {"w4a8": W4A8, "w8": W8}, {"a": ("w4a8", "w4a8"), "b": ("w8", None)})


def test_json_round_trip():
    assert QuantPlan.from_json(plan().to_json()) == plan()
    assert QuantPlan.from_json(plan().to_json()).to_json() == plan().to_json()


def test_average_bits_count_every_linear():
    numel = {"a": 100, "b": 200, "kept": 100}
    # a: 4; b: 8 for a quarter, 16 for the rest; kept: 16
    assert plan().average_weight_bits(numel) == pytest.approx((100 * 4 + 200 * (2 + 12) + 100 * 16) / 400)
    assert plan().average_activation_bits(numel) == pytest.approx((100 * 8 + 200 * 16 + 100 * 16) / 400)
    with pytest.raises(UserError, match="quantizes b, which the model lacks"):
        plan().average_weight_bits({"a": 1})


def test_needs_stats_only_when_a_used_scheme_does():
    static = LayerScheme(W8.weight, QuantSpec(8))
    assert not plan().needs_stats
    assert not QuantPlan((0, 1), {"s": static, "w": W8}, {"a": ("w",)}).needs_stats
    assert QuantPlan((0, 1), {"s": static}, {"a": ("s",)}).needs_stats


@pytest.mark.parametrize(
    "edges",
    [
        [0, 0.5],
        [0.1, 1],
        [0, 0.7, 0.5, 1],
        [0, 0.5, 0.5, 1],
        [1, 0],
        [0],
        [],
        "0,1",
        3,
        None,
        [0, "x", 1],
        [False, True],
    ],
)
def test_segments_must_tile_the_unit_interval(edges):
    with pytest.raises(UserError, match=r"must tile \[0, 1\]"):
        check_edges(edges)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "the plan has no field 'extra'"),
        ({"edges": [0, 1]}, "layer a names 2 schemes for 1 segments"),
        ({"layers": {"a": ["w4", None]}}, "layer a names the unknown scheme 'w4'; close names: w4a8, w8"),
        ({"layers": {"a": "w8"}}, "must list one scheme per segment"),
        ({"layers": {"a": [5]}}, "must list one scheme per segment"),
        ({"layers": {"a": [["w8"]]}}, "must list one scheme per segment"),
        (
            {"schemes": {"w8": {**W8.to_dict(), "transforms": None}}},
            "transforms of a LayerScheme must be a list, got None",
        ),
        ({"layers": []}, "'layers' must be a mapping"),
        ({"schemes": {"w8": {"weight": None}}}, "lacks the field 'activation'"),
    ],
)
def test_from_json_is_strict(change, message):
    with pytest.raises(UserError, match=message):
        QuantPlan.from_json(json.dumps({**json.loads(plan().to_json()), **change}))


def test_from_json_refuses_what_is_not_a_plan():
    with pytest.raises(UserError, match="not valid JSON"):
        QuantPlan.from_json(plan().to_json()[:-20])
    with pytest.raises(UserError, match="lacks the field 'edges'"):
        QuantPlan.from_json("{}")
    with pytest.raises(UserError, match="must be a mapping"):
        QuantPlan.from_json("[]")


def test_a_plan_file_that_is_no_text(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(b"\x93\xff\x00")
    with pytest.raises(UserError, match=r"plan\.json cannot be read as a plan\.json"):
        PlanFile(str(path)).plan(Recipe(QuantSpec(4)), ["a"], [])


def test_a_plan_file_leaves_in_float_what_the_model_keeps(tmp_path):
    scheme = LayerScheme(QuantSpec(8, granularity="channel"), None)
    path = tmp_path / "plan.json"
    path.write_text(QuantPlan((0, 0.5, 1), {"w8": scheme}, {"a": ("w8", "w8"), "b": ("w8", None)}).to_json())
    setting = (Recipe(QuantSpec(4)), ["a", "b", "c"])
    assert PlanFile(str(path)).plan(*setting, ["c"]).layers["a"] == ("w8", "w8")
    with pytest.raises(UserError, match=r"quantizes 'b', which this model keeps in float .*out of model\.keep_float"):
        PlanFile(str(path)).plan(*setting, ["c", "b*"])
    path.write_text(QuantPlan((0, 1), {"w8": scheme}, {"a": (None,)}).to_json())
    assert PlanFile(str(path)).plan(*setting, ["a"]).layers == {"a": (None,)}
