"""Each format's tensors and what comfy-kitchen computes with them, as it was recorded (tests/data/golden)."""

import json

import pytest
import torch
from kitchen import GOLDEN, SCHEMES, TOKEN, exported, kitchen_linear, problem, scheme, variant_of
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from viditq.export.comfy_formats import common_marker, markers, nearest, refusal
from viditq.quant import ConvRotSpec, LayerScheme, QuantSpec, RotateSpec, SmoothSpec, get_backend


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def told() -> dict[str, dict[str, object]]:
    with safe_open(GOLDEN, "pt") as file:
        return dict(json.loads(file.metadata()["markers"]))


def relative(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("name", SCHEMES)
def test_codes_and_scales_are_those_that_were_recorded(name: str, golden, told) -> None:
    tensors, marker = exported(variant_of(SCHEMES[name], golden["weight"]))
    assert marker == told[name]
    assert {f"{name}.{field}" for field in tensors} | {f"{name}.output"} == {
        n for n in golden if n.startswith(f"{name}.")
    }
    for field, tensor in tensors.items():
        wanted = golden[f"{name}.{field}"]
        assert tensor.dtype == wanted.dtype and tensor.shape == wanted.shape
        if wanted.dtype == torch.int8:  # a rotation's last bit may move a code on the edge between two
            assert float((tensor != wanted).float().mean()) < 1e-3
        else:
            torch.testing.assert_close(tensor.float(), wanted.float(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", ["fake", "native", "portable"])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_library_computes_what_we_do(name: str, backend: str, golden) -> None:
    """Its recorded outputs, from the tensors of the file, are those of our backends: rounding of float32 apart."""
    variant = variant_of(SCHEMES[name], golden["weight"])
    chosen = get_backend(backend)
    if not chosen.supports(variant.scheme):
        pytest.skip("weight only")
    chosen.check_available()
    chosen.prepare(variant)
    assert relative(chosen.linear(variant, golden["x"], golden["bias"]), golden[f"{name}.output"]) < 2e-6


@pytest.mark.parametrize("name", SCHEMES)
def test_the_library_itself(name: str, golden) -> None:
    pytest.importorskip("comfy_kitchen")
    tensors, marker = exported(variant_of(SCHEMES[name], golden["weight"]))
    assert relative(kitchen_linear(tensors, marker, golden["x"], golden["bias"]), golden[f"{name}.output"]) < 2e-6


def test_few_bits_take_few_bytes(golden) -> None:
    sizes = {name: sum(golden[n].nbytes for n in golden if n.startswith(f"{name}.weight")) for name in SCHEMES}
    assert sizes["int4_convrot256"] < 0.66 * sizes["int8_convrot256"] and sizes["int4"] == sizes["int8"]
    assert sizes["int4_group64_weight_only"] < 0.8 * sizes["int8_weight_only"]


def test_halves_of_rows_change_places() -> None:
    _, weight_OC, _ = problem()
    for name in ("int8", "int4_convrot64", "int4_group64_weight_only"):
        variant = variant_of(SCHEMES[name], weight_OC)
        (plain, _), (swapped, _) = exported(variant), exported(variant, swapped=True)
        for field in plain:
            dim = 1 if name.endswith("weight_only") and field != "weight" else 0
            assert torch.equal(torch.cat(plain[field].chunk(2, dim)[::-1], dim), swapped[field])


W8, A8 = QuantSpec(8, True, "channel"), TOKEN
REFUSED: dict[str, tuple[LayerScheme, object]] = {
    "activation.symmetric": (LayerScheme(W8, QuantSpec(8, False, "token", dynamic=True)), False),
    "activation.bits": (LayerScheme(W8, QuantSpec(6, True, "token", dynamic=True)), 6),
    "activation.granularity": (LayerScheme(W8, QuantSpec(8, True, "group", 64, dynamic=True)), "group"),
    "activation.dynamic": (LayerScheme(W8, QuantSpec(8, True)), False),
    "weight.symmetric": (LayerScheme(QuantSpec(8, False, "channel"), A8), False),
    "weight.granularity": (LayerScheme(QuantSpec(4, True, "group", 64), A8), "group"),
    "weight": (LayerScheme(None, A8), None),
    "low_rank": (LayerScheme(W8, A8, low_rank=4), 4),
    "transforms": (LayerScheme(W8, A8, (SmoothSpec(0.5),)), ["smooth"]),
}
MORE = [
    ("transforms", LayerScheme(W8, A8, (RotateSpec(),))),
    ("transforms", LayerScheme(W8, A8, (SmoothSpec(0.5), ConvRotSpec()))),
    ("transforms", LayerScheme(W8, None, (ConvRotSpec(),))),
    ("transforms", LayerScheme(W8, A8, (ConvRotSpec(16), ConvRotSpec(64)))),
    ("activation.granularity", LayerScheme(W8, QuantSpec(8, True, "tensor", dynamic=True))),
    ("weight.symmetric", LayerScheme(QuantSpec(8, False, "channel"), None)),
    ("weight.granularity", LayerScheme(QuantSpec(6, True, "group", 64), None)),
]


@pytest.mark.parametrize("field", REFUSED)
def test_what_no_format_holds_is_refused_by_its_field(field: str) -> None:
    of, value = REFUSED[field]
    found = refusal(of, "a.b")
    assert found is not None and (found.layer, found.field, found.value) == ("a.b", field, value)


@pytest.mark.parametrize(("field", "of"), MORE)
def test_more_of_the_kind(field: str, of: LayerScheme) -> None:
    found = refusal(of, "a.b")
    assert found is not None and found.field == field


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_held_is_not_refused(name: str) -> None:
    assert refusal(SCHEMES[name], "a.b") is None and markers(SCHEMES[name], 256)


def test_the_nearest_is_of_the_same_bits() -> None:
    for of, _ in REFUSED.values():
        few = of.weight is not None and of.weight.bits == 4
        assert nearest(of).startswith("quant=w4a8_sym" if few else "quant=w8a8_sym")
    assert nearest(LayerScheme(QuantSpec(4, False, "channel"), None)).startswith("quant=w4 ")


def test_parts_of_one_tensor_share_the_smallest_format_that_all_have() -> None:
    w8, w4 = (markers(scheme(bits, rotate=64), 256) for bits in (8, 4))
    assert common_marker([w4, w4]) == w4[0] and w4[0]["format"] == "asym_w4a8_int8"
    assert common_marker([w4, w8]) == w8[0] == {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
    assert common_marker([w8, markers(scheme(8), 256)]) is None
    assert common_marker([w8, []]) is None
