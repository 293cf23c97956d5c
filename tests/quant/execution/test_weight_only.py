"""Weights decoded while their layers are called: equal to `fake` to the bit, and codes are all that is kept."""

from pathlib import Path

import pytest
import torch
from agreement import DTYPES, variant_of, weight_formats
from torch import nn

from viditq.quant import LayerScheme, QuantSpec, Recipe, linear_names
from viditq.quant.artifact import load_denoiser
from viditq.quant.artifact_writer import save_denoiser
from viditq.quant.convert import quantize_denoiser
from viditq.quant.execution.backends import get_backend, weight_only
from viditq.quant.methods.transforms import Chain, Rotate, Smooth
from viditq.quant.numerics.hadamard import random_signs
from viditq.quant.sizes import held_bytes, laid_out, weight_bytes

W4, A8 = QuantSpec(4, granularity="group", group_size=64), QuantSpec(8, granularity="token", dynamic=True)


def pair(spec: QuantSpec | None, dtype: torch.dtype, chain: Chain | None = None, low_rank: int | None = None) -> None:
    """Both backends on one variant, with a bias and without, an input of three axes and an empty one."""
    weight, x = torch.randn(40, 192).to(dtype), torch.randn(2, 5, 192).to(dtype)
    bias = torch.randn(40).to(dtype)
    variant = variant_of(spec, None, x, weight, chain, low_rank)
    mine, fake = get_backend("weight_only"), get_backend("fake")
    fake.prepare(variant)
    mine.prepare(variant)
    for given in (x, x[:0]):
        for b in (bias, None):
            assert torch.equal(mine.linear(variant, given, b), fake.linear(variant, given, b))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", weight_formats(floats=True))
def test_equals_fake_in_every_format(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_only, "PIECE_WEIGHTS", 7 * 192)  # 40 rows: the last piece is shorter
    torch.manual_seed(0)
    pair(weight_formats(floats=True)[name], dtype)


def test_equals_fake_behind_transforms_beside_a_branch_and_in_float() -> None:
    torch.manual_seed(0)
    chain = Chain([Smooth(torch.rand(192) + 0.5), Rotate(random_signs(192, 0))])
    pair(W4, torch.float32, chain)
    pair(W4, torch.bfloat16, low_rank=4)
    pair(None, torch.float32)


def test_activations_are_not_its_to_quantize() -> None:
    assert get_backend("weight_only").unsupported_field(LayerScheme(W4, A8)) == "activation"
    assert get_backend("weight_only").supports(LayerScheme(W4, None))


def test_auto_keeps_the_codes_alone(tmp_path: Path) -> None:
    """A quarter of bfloat16 and the scales, where `fake` has the decoded weight beside them."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).to(torch.bfloat16)

    model = make()
    plan = Recipe(W4, None).resolve(linear_names(model))
    quantize_denoiser(model, plan, None)
    save_denoiser(tmp_path / "artifact", model, plan, {})
    x, found = torch.randn(3, 256).to(torch.bfloat16), {}
    for backend in ("auto", "fake"):
        loaded, *_ = load_denoiser(tmp_path / "artifact", make, backend)
        assert torch.equal(loaded(x), model(x))
        found[backend] = held_bytes(loaded)
    codes = weight_bytes(laid_out(make().to("meta"), plan, backend="auto"))
    assert codes.dense == 0
    dense = 2 * 2 * 256 * 512
    assert found["fake"] - found["auto"] >= dense
    assert codes.resident < 0.36 * dense
