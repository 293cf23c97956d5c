"""`model.to(torch.bfloat16)`: a quantized model computes in another type, and what is quantized stays as it was."""

import copy

import pytest
import torch

from viditq.quant import QuantSpec, Recipe, Rule, SmoothSpec, linear_names, quantize_denoiser
from viditq.quant.execution.backends import get_backend
from viditq.quant.execution.backends.auto import why_unavailable
from viditq.quant.execution.linear import quant_linears

W4, A8 = QuantSpec(4, granularity="channel"), QuantSpec(8, granularity="token", dynamic=True)
RECIPES = {
    "timestep_aware": Recipe(W4, A8, SmoothSpec([0.3, 0.5], True), segments=(0, 0.5, 1)),
    "static": Recipe(QuantSpec(8, True), QuantSpec(8), segments=(0, 0.5, 1)),
    "low_rank": Recipe(W4, A8, SmoothSpec(0.5), low_rank=4, rules=[Rule("time", keep_float=True)]),
    "weights_alone": Recipe(W4, None),
}


@pytest.mark.parametrize("backend", ["fake", "portable", "native", "weight_only"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_cast_changes_no_code_and_no_scale(make_denoiser, calibrated, name, backend):
    if (reason := why_unavailable(get_backend(backend))) is not None:
        pytest.skip(reason)
    if (backend == "weight_only") != (name == "weights_alone") and backend != "fake":
        pytest.skip(f"{backend} does not take {name}")
    torch.manual_seed(0)
    denoiser = make_denoiser(torch.float32)
    plan = RECIPES[name].resolve(linear_names(denoiser))
    quantize_denoiser(denoiser, plan, calibrated(denoiser, [1, 2], [980, 640, 300, 10]), backend)
    before, stored = outputs(denoiser), {key: value.clone() for key, value in codes(denoiser).items()}

    cast = copy.deepcopy(denoiser).to(torch.bfloat16)
    assert all(
        torch.equal(value, stored[key]) and value.dtype == stored[key].dtype for key, value in codes(cast).items()
    )
    out = outputs(cast)
    assert out.dtype == torch.bfloat16 and all(linear.dtype == out.dtype for linear in quant_linears(cast).values())
    assert (out.double() - before.double()).norm() < 0.05 * before.double().norm()
    if name != "low_rank":  # the branch has lost its last bits, as a float Linear would
        there = {key: value for key, value in denoiser.state_dict().items() if "variants" not in key}
        cast.to(torch.float32).load_state_dict(there, strict=False)
        assert torch.equal(outputs(cast), before), "nothing is derived from what was cast"


def codes(denoiser: torch.nn.Module) -> dict[str, torch.Tensor]:
    state = denoiser.state_dict()
    return {key: value for key, value in state.items() if "variants" in key and "low_rank" not in key}


def outputs(denoiser: torch.nn.Module) -> torch.Tensor:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(5)).to(next(denoiser.parameters()))
    with torch.no_grad():
        return torch.stack([denoiser(x, torch.full((2,), t)) for t in (10, 400, 600, 990)])
