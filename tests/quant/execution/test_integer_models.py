"""A whole denoiser and its artifact on the backends of integers and FP8."""

import pytest
import torch
from agreement import home_of

from viditq.errors import UserError
from viditq.quant import (
    QuantSpec,
    Recipe,
    RotateSpec,
    Rule,
    SmoothSpec,
    linear_names,
    load_denoiser,
    quantize_denoiser,
    save_denoiser,
)
from viditq.quant.execution.backends import get_backend
from viditq.quant.execution.backends.auto import why_unavailable
from viditq.quant.execution.linear import quant_linears

W4, A8 = QuantSpec(4, granularity="channel"), QuantSpec(8, granularity="token", dynamic=True)
RECIPES = {
    "timestep_aware": Recipe(W4, A8, SmoothSpec([0.3, 0.5], True), segments=(0, 0.5, 1)),
    "static": Recipe(QuantSpec(8, True), QuantSpec(8), segments=(0, 0.5, 1)),
    "scaled_and_rotated": Recipe(W4, QuantSpec(8), [SmoothSpec(0.3), RotateSpec()], segments=(0, 0.5, 1)),
    "low_rank": Recipe(
        W4, A8, SmoothSpec(0.5), low_rank=4, rules=[Rule("time", keep_float=True), Rule("proj_in", low_rank=2)]
    ),
    "groups": Recipe(
        QuantSpec(3, False, "group", 8), QuantSpec(8, dynamic=True), rules=[Rule("time", keep_float=True)]
    ),
}

TENSOR, CHANNEL = (QuantSpec(8, True, granularity, number="e4m3") for granularity in ("tensor", "channel"))
IN_FP8 = {
    "timestep_aware": Recipe(
        CHANNEL,
        QuantSpec(8, True, "token", dynamic=True, number="e4m3"),
        SmoothSpec([0.3, 0.5], True),
        segments=(0, 0.5, 1),
    ),
    "static": Recipe(TENSOR, TENSOR, segments=(0, 0.5, 1)),
}


@pytest.fixture(params=["native", "portable", pytest.param("triton", marks=pytest.mark.slow)])
def backend(request) -> str:
    if (reason := why_unavailable(get_backend(request.param))) is not None:
        pytest.skip(reason)
    return request.param


def outputs(denoiser) -> torch.Tensor:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(5)).to(next(denoiser.parameters()))
    with torch.no_grad():
        return torch.stack([denoiser(x, torch.full((2,), t, device=x.device)) for t in (10, 400, 600, 990)])


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_artifact_gives_the_same_outputs_and_is_saved_as_it_was(
    make_denoiser, calibrated, tmp_path, backend, name, dtype
):
    check(make_denoiser, calibrated, tmp_path, backend, RECIPES[name], dtype)


@pytest.mark.parametrize("name", IN_FP8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_artifact_in_fp8_does_too(make_denoiser, calibrated, tmp_path, name, dtype):
    if (reason := why_unavailable(get_backend("scaled_mm"))) is not None:
        pytest.skip(reason)
    check(make_denoiser, calibrated, tmp_path, "scaled_mm", IN_FP8[name], dtype)


def check(make_denoiser, calibrated, tmp_path, backend, recipe, dtype):
    torch.manual_seed(0)
    denoiser = make_denoiser(dtype)
    plan = recipe.resolve(linear_names(denoiser))
    quantize_denoiser(denoiser, plan, calibrated(denoiser, [1, 2], [980, 640, 300, 10]))
    save_denoiser(tmp_path / "fake", denoiser, plan, {})
    loaded, *_ = load_denoiser(tmp_path / "fake", lambda: make_denoiser(dtype), backend)
    home = home_of(get_backend(backend))
    expected, out = outputs(denoiser).double(), outputs(loaded.to(home)).double().cpu()
    # roundings of one layer flip codes of the next
    assert (out - expected).norm() / expected.norm() < 5e-3 + 2 * torch.finfo(dtype).eps
    save_denoiser(tmp_path / "again", loaded, plan, {})
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("fake", "again")]
    assert files[0] == files[1]
    held = [[variant.held for variant in layer.variants] for layer in quant_linears(loaded).values()]
    assert all(each is not None for layer in held for each in layer)
    if not recipe.activation.dynamic and not recipe.smoothing:
        assert all(len({id(each) for each in layer}) == 1 for layer in held), "segments share their weight"


def test_a_scheme_that_is_not_supported_is_refused_before_anything_is_changed(make_denoiser, backend):
    denoiser = make_denoiser(torch.float32)
    plan = Recipe(W4, None).resolve(linear_names(denoiser))
    with pytest.raises(UserError, match=f"backend {backend} cannot run .*activation=None"):
        quantize_denoiser(denoiser, plan, None, backend)
    assert not quant_linears(denoiser)
