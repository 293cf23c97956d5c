import dataclasses
import json

import pytest

from viditq.errors import UserError
from viditq.quant import (
    AdaRound,
    Gptq,
    GridFit,
    LayerScheme,
    LpSearch,
    Percentile,
    QuantSpec,
    RotateSpec,
    SmoothSpec,
    TransformSpec,
)


@pytest.mark.parametrize("bits", [0, 1, 9, 17, "four", "8", 4.0, True, None])
def test_bits_must_be_a_whole_number_from_2_to_8(bits):
    with pytest.raises(UserError, match=r"bits=.*whole number from 2 to 8") as error:
        QuantSpec(bits)
    assert repr(bits) in str(error.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"granularity": "row"}, "granularity='row' is unknown; choose one of tensor, channel, token, group"),
        ({"granularity": "group"}, "granularity=group needs group_size"),
        ({"granularity": "group", "group_size": 0}, "granularity=group needs group_size"),
        ({"granularity": "group", "group_size": "64"}, "granularity=group needs group_size"),
        ({"group_size": 64}, "group_size=64 only goes with granularity=group"),
        ({"symmetric": "yes"}, "symmetric='yes' must be true or false"),
        ({"full_range": 1}, "full_range=1 must be true or false"),
        ({"symmetric": True, "full_range": True}, "full_range only goes with symmetric=true and dynamic=true"),
        ({"dynamic": True, "full_range": True}, "full_range only goes with symmetric=true and dynamic=true"),
        ({"dynamic": 1}, "dynamic=1 must be true or false"),
    ],
)
def test_impossible_formats(kwargs, message):
    with pytest.raises(UserError, match=message):
        QuantSpec(8, **kwargs)


@pytest.mark.parametrize(
    ("weight", "activation", "message"),
    [
        (QuantSpec(4, granularity="token"), None, "a weight cannot have granularity=token"),
        (QuantSpec(4, dynamic=True), None, "a weight cannot be dynamic"),
        (None, QuantSpec(8, granularity="token"), "set dynamic=true, or granularity=tensor"),
        (None, QuantSpec(8, granularity="channel", dynamic=True), "set dynamic=false, or granularity=token"),
        (8, None, "take a QuantSpec"),
    ],
)
def test_what_a_weight_or_an_activation_cannot_be(weight, activation, message):
    with pytest.raises(UserError, match=message):
        LayerScheme(weight, activation)


SCHEMES = [
    LayerScheme(None, None),
    LayerScheme(QuantSpec(4, granularity="channel"), QuantSpec(8, granularity="token", dynamic=True)),
    LayerScheme(QuantSpec(3, True, "group", 64), QuantSpec(8), (SmoothSpec(0.3, True, "percentile", 99),)),
    LayerScheme(QuantSpec(8), QuantSpec(8, granularity="channel"), (SmoothSpec("auto"),)),
    LayerScheme(QuantSpec(8), QuantSpec(8, True, "token", dynamic=True, full_range=True)),
    LayerScheme(
        QuantSpec(4), QuantSpec(8), (SmoothSpec(), RotateSpec(7)), Gptq(0.1, False), LpSearch(2, 5), Percentile(99), 3
    ),
    LayerScheme(QuantSpec(4), None, rounding=AdaRound(10), ranges=GridFit(3)),
]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dict_round_trip(scheme):
    assert LayerScheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wieght": None}, "LayerScheme has no field 'wieght'; close names: weight"),
        ({"weight": {"bits": 4, "n_bits": 4}}, "QuantSpec has no field 'n_bits'; close names: bits"),
        ({"weight": {}}, "QuantSpec needs the field 'bits'"),
        ({"weight": 4}, "QuantSpec must be a mapping of fields, got 4"),
        ({"transforms": [{"name": "os.system"}]}, "unknown transform 'os.system'"),
        ({"transforms": [{"alpha": 0.5}]}, "a transform must be a mapping with a 'name'"),
        (
            {"transforms": [{"name": "smooth", "alfa": 1}]},
            "transform smooth has no field 'alfa'; close names: alpha",
        ),
        ({"transforms": [{"name": "smooth", "alpha": [0.1, 0.2]}]}, "2 values for 1 segments"),
        ({"rounding": "up"}, "unknown rounding 'up'; known names: adaround, block_adaround, gptq, nearest"),
    ],
)
def test_from_dict_is_strict(change, message):
    with pytest.raises(UserError, match=message):
        LayerScheme.from_dict({**SCHEMES[1].to_dict(), **change})


def test_from_dict_wants_every_field():
    fields = SCHEMES[0].to_dict()
    del fields["rounding"]
    with pytest.raises(UserError, match="lacks the field 'rounding'"):
        LayerScheme.from_dict(fields)


def test_transform_round_trip_by_name():
    spec = SmoothSpec(0.25, per_segment=True)
    assert TransformSpec.from_dict(spec.to_dict()) == spec


def test_descriptions_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SCHEMES[1].rounding = "x"


def test_a_field_that_is_not_used_is_not_in_plans_and_fingerprints_on_disk():
    assert "full_range" not in QuantSpec(8, True, "token", dynamic=True).to_dict()
    assert QuantSpec(8, True, "token", dynamic=True, full_range=True).to_dict()["full_range"] is True
