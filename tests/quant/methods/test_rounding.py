"""Roundings: what all promise, GPTQ against a plain loop with exact inverses, AdaRound against all assignments."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from viditq.errors import UserError
from viditq.quant import AdaRound, Chain, Gptq, MinMax, Nearest, QuantSpec, RotateSpec, RoundingSpec, Smooth
from viditq.quant.description.registry import ROUNDINGS
from viditq.quant.methods.quantizer import dequantize_weight, weight_grid
from viditq.quant.methods.rounding.adaround import row_errors
from viditq.quant.methods.rounding.gptq import damped_diagonal, inverse_root

SPECS = [QuantSpec(b, s, g, k) for b in (2, 4) for s in (False, True) for g, k in [("channel", None), ("group", 32)]]
SPECS += [QuantSpec(3, granularity="tensor")]


def correlated(num_rows: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(width // 4, width, generator=generator)
    x = torch.randn(num_rows, width // 4, generator=generator) @ factors
    return x + 0.3 * torch.randn(num_rows, width, generator=generator)


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [24, 160] (more than one block of GPTQ's columns) and correlated inputs."""
    return torch.randn(24, 160, generator=torch.Generator().manual_seed(1)), correlated(600, 160)


def rounded(rounding: RoundingSpec, weight: torch.Tensor, x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    codes = rounding.quantize(weight, spec, weight_grid(weight, spec, MinMax()), x.T @ x)
    return dequantize_weight(codes, spec)


def output_error(weight: torch.Tensor, back: torch.Tensor, x: torch.Tensor) -> float:
    return float((F.linear(x, back) - F.linear(x, weight)).square().sum())


@pytest.mark.parametrize("name", ROUNDINGS.names())
@pytest.mark.parametrize("spec", SPECS)
def test_codes_stay_on_the_grid_that_was_given(problem, name, spec):
    weight, x = problem
    kept, grid = weight.clone(), weight_grid(weight, spec, MinMax())
    rounding = AdaRound(30) if name == "adaround" else RoundingSpec.parse(name)
    quantized = rounding.quantize(weight, spec, grid, x.T @ x)
    assert torch.equal(weight, kept)
    assert torch.equal(quantized.scale, grid[0])
    assert (quantized.zero_point is None) == spec.symmetric
    assert quantized.codes.dtype == torch.uint8 and int(quantized.codes.max()) < 2**spec.bits


@pytest.mark.parametrize("rounding", [Gptq(), Gptq(descending=False), AdaRound(200)])
@pytest.mark.parametrize("spec", SPECS)
def test_it_beats_nearest_on_correlated_inputs(problem, rounding, spec):
    weight, x = problem
    ours, nearest = (output_error(weight, rounded(r, weight, x, spec), x) for r in (rounding, Nearest()))
    assert ours < 0.75 * nearest
    fresh = correlated(600, 160) + 0.1 * correlated(600, 160, seed=9)  # other rows of about the same kind
    ours, nearest = (output_error(weight, rounded(r, weight, x, spec), fresh) for r in (rounding, Nearest()))
    assert ours < 0.85 * nearest


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("spec", [QuantSpec(4, granularity="channel"), QuantSpec(3, True, "group", 10)])
def test_gptq_is_the_plain_loop_with_exact_inverses(descending, spec):
    """Optimal brain quantization of one column after the other, H^-1 of the rest inverted anew each time, float64."""
    weight, x = torch.randn(6, 40, generator=torch.Generator().manual_seed(2)), correlated(200, 40)
    scale, zero = weight_grid(weight, spec, MinMax())
    wide = [
        p.double().expand(6, 4, 10).reshape(6, 40) if p.ndim == 3 else p.double().expand(6, 40) for p in (scale, zero)
    ]
    hessian = x.double().T @ x.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(40)
    order = hessian.diagonal().argsort(descending=True) if descending else torch.arange(40)
    low, high = (-4, 3) if spec.symmetric else (0, 15)
    w, want = weight.double().clone(), torch.zeros(6, 40, dtype=torch.float64)
    for place, column in enumerate(order):
        rest = order[place:]
        inverse = torch.linalg.inv(hessian[rest][:, rest])
        codes = ((w[:, column] / wide[0][:, column]).round() + wide[1][:, column]).clamp(low, high)
        want[:, column] = (codes - wide[1][:, column]) * wide[0][:, column]
        error = (w[:, column] - want[:, column]) / inverse[0, 0]
        w[:, rest] -= error[:, None] * inverse[0][None]
    found = dequantize_weight(Gptq(descending=descending).quantize(weight, spec, (scale, zero), x.T @ x), spec)
    agree = ((found - want).abs() < 1e-5).double().mean()
    assert agree > 0.98  # a tie within float32's error may fall the other way, and then the rest of its row differs
    assert output_error(weight, found, x) == pytest.approx(output_error(weight, want.float(), x), rel=0.02)


def test_the_root_of_the_inverse():
    x = correlated(300, 48)
    hessian, order = x.T @ x, torch.randperm(48)
    before = hessian.clone()
    diagonal = damped_diagonal(hessian.diagonal(), 0.01)
    root = inverse_root(hessian, diagonal, order)
    assert torch.equal(root, root.triu()) and torch.equal(hessian, before)
    hessian.diagonal().copy_(diagonal)
    hessian = hessian[order][:, order]
    torch.testing.assert_close(root.T @ root, torch.linalg.inv(hessian.double()).float(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("rounding", [Gptq(), AdaRound(50)])
def test_dead_inputs_and_few_rows(rounding):
    weight, x = torch.randn(8, 32), correlated(5, 32)
    x[:, 3] = x[:, 17] = 0
    spec = QuantSpec(4, granularity="channel")
    back = rounded(rounding, weight, x, spec)
    assert torch.isfinite(back).all()
    assert output_error(weight, back, x) <= output_error(weight, rounded(Nearest(), weight, x, spec), x)
    silent = rounded(rounding, weight, torch.zeros(5, 32), spec)
    assert torch.equal(silent, rounded(Nearest(), weight, x, spec))


def test_adaround_lies_between_nearest_and_the_best_of_all_assignments():
    """2^8 ways to round a row of 8 weights down or up, strongly correlated inputs; descent finds a local best."""
    weight, x = torch.randn(12, 8, generator=torch.Generator().manual_seed(4)), correlated(100, 8)
    spec = QuantSpec(3, granularity="channel")
    scale, zero = weight_grid(weight, spec, MinMax())
    down = (weight / scale).floor() + zero
    ups = torch.tensor(list(product((0.0, 1.0), repeat=8)))
    every = ((down[:, None] + ups).clamp(0, 7) - zero[:, None]) * scale[:, None]
    best = torch.stack([row_errors(e - w, x.T @ x).min() for e, w in zip(every, weight, strict=True)])
    found = row_errors(rounded(AdaRound(), weight, x, spec) - weight, x.T @ x)
    nearest = row_errors(rounded(Nearest(), weight, x, spec) - weight, x.T @ x)
    assert (found >= best * 0.999).all()
    assert (found <= nearest * 1.001).all()
    assert float(found.sum()) < 0.55 * float(nearest.sum())
    assert float(found.sum()) < 2.5 * float(best.sum())


def test_adaround_rounds_down_or_up_and_never_makes_a_row_worse(problem):
    weight, x = problem
    spec = QuantSpec(4, granularity="channel")
    grid = weight_grid(weight, spec, MinMax())
    back = dequantize_weight(AdaRound(20).quantize(weight, spec, grid, x.T @ x), spec)
    assert ((back - weight).abs() <= grid[0] * 1.001).all()
    nearest = rounded(Nearest(), weight, x, spec)
    assert (row_errors(back - weight, x.T @ x) <= row_errors(nearest - weight, x.T @ x) * 1.0001).all()


def test_the_error_of_a_layer_depends_on_its_rows_by_their_second_moments(problem):
    weight, x = problem
    error = torch.randn_like(weight)
    torch.testing.assert_close(row_errors(error, x.T @ x), F.linear(x, error).square().sum(0), rtol=1e-4, atol=0)


def test_moments_go_through_the_chain():
    x, weight = correlated(100, 48), torch.randn(3, 48)
    chain = Chain([Smooth(torch.rand(48) + 0.5), RotateSpec().fit(weight, None, None)])
    y = chain.activation(x)
    torch.testing.assert_close(chain.moments(x.T @ x), y.T @ y, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gptq(0), "damping=0 is not possible"),
        (lambda: Gptq(descending="yes"), "descending='yes' must be true or false"),
        (lambda: AdaRound(0), "iterations=0 is not possible"),
        (lambda: AdaRound(strength=-1), "strength=-1 is not possible"),
        (lambda: AdaRound(learning_rate=True), "learning_rate=True is not possible"),
        (lambda: RoundingSpec.parse("gtpq"), "unknown rounding 'gtpq'; close names: gptq"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_gptq_says_that_the_damping_is_too_small():
    torch.manual_seed(0)
    x, weight = torch.randn(4, 64), torch.randn(8, 64)  # fewer rows than inputs
    rounded(Gptq(0.01), weight, x, QuantSpec(4, granularity="channel"))
    with pytest.raises(UserError, match="so small a damping"):
        rounded(Gptq(1e-12), weight, x, QuantSpec(4, granularity="channel"))
