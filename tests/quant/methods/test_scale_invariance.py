"""Quantizing c x equals c times quantizing x: to the bit for powers of two, but for float rounding for all c."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.quant import (
    AdaRound,
    BlockAdaRound,
    Calibrator,
    FoldableSpec,
    Gptq,
    GridFit,
    LayerScheme,
    LpSearch,
    MinMax,
    Nearest,
    NormalSteps,
    Percentile,
    QuantSpec,
    RangeSpec,
    Recipe,
    RotateSpec,
    SalienceSpec,
    SmoothSpec,
    quantize_denoiser,
)
from viditq.quant.execution.variant import Variant
from viditq.quant.methods.quantizer import (
    dequantize_weight,
    fake_quantize_activation,
    quantize_weight,
    static_qparams,
    weight_grid,
)
from viditq.quant.methods.transforms import Chain
from viditq.quant.numerics.affine import EMPTY_SCALE, compute_qparams, fake_quantize_own_range

FOLDER = Path(__file__).parents[3] / "conf" / "quant" / "format"
FORMATS = {
    path.stem: QuantSpec(**{k: v for k, v in yaml.safe_load(path.read_text()).items() if k != "_target_"})
    for path in sorted(FOLDER.glob("*.yaml"))
}
FORMATS = {name: spec for name, spec in FORMATS.items() if not spec.is_float}  # powers of two as scales jump
POWERS = [2.0**k for k in (-99, -1, 99)]
FACTORS = [1e-30, 3.7e-9, 1e30]


def allowed(check: str) -> Iterator[str]:
    for name, spec in FORMATS.items():
        try:
            getattr(spec, check)()
        except UserError:
            continue
        yield name


WEIGHTS, ACTIVATIONS = ([*allowed(check)] for check in ("check_weight", "check_activation"))
STATIC = [name for name in ACTIVATIONS if not FORMATS[name].dynamic]
RANGES: list[RangeSpec] = [MinMax(), Percentile(99.0), LpSearch(2.4, 20), LpSearch(2.0, 20), NormalSteps(), GridFit(5)]


def values(*shape: int) -> Tensor:
    """Rows of different sizes, one of them empty."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(*shape, generator=generator) * torch.logspace(-2, 1, shape[-2])[:, None]
    rows[..., 3, :] = 0
    return rows


def assert_times(scaled: Tensor, plain: Tensor, factor: float, step: Tensor, flips: float = 0.002) -> None:
    """scaled = factor x plain, but for rounding; then a value in the middle between two codes may go to the other."""
    if factor in POWERS:
        assert torch.equal(scaled, factor * plain)
        return
    off = (scaled.double() / factor - plain.double()).abs() / step
    assert off.max() < 1.001 and (off > 1e-3).double().mean() <= flips


@pytest.mark.parametrize("factor", POWERS + FACTORS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name, factor):
    weight, spec = values(12, 128), FORMATS[name]
    plain, scaled = (quantize_weight(w, spec) for w in (weight, factor * weight))
    y, z = (dequantize_weight(q, spec) for q in (plain, scaled))
    step = plain.scale.flatten(1).amax(1, True)
    assert_times(z, y, factor, step)
    full = plain.scale > EMPTY_SCALE
    ratio = scaled.scale[full].double() / plain.scale[full].double()
    torch.testing.assert_close(ratio, torch.full_like(ratio, factor), rtol=1e-6, atol=0)
    assert torch.equal(scaled.scale[~full], plain.scale[~full])
    assert not z[3].any() and (y[weight != 0] != 0).double().mean() > 0.1


@pytest.mark.parametrize("factor", POWERS + FACTORS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, factor):
    x, spec = values(2, 12, 128), FORMATS[name]

    def quantized(x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        static = None if spec.dynamic else static_qparams(rows.amin(0), rows.amax(0), spec)
        return fake_quantize_activation(x, spec, static)

    step = x.abs().max() / (2 ** (spec.bits - 1) - 1)
    assert_times(quantized(factor * x), quantized(x), factor, step)
    assert torch.equal(quantized(0 * x), 0 * x)


@pytest.mark.parametrize("factor", POWERS + FACTORS)
@pytest.mark.parametrize(("ranges", "symmetric"), [*product(RANGES, (False, True))])
def test_ranges(ranges, symmetric, factor):
    """Where two ranges are nearly as good the other may be found; their errors then are the same."""
    spec = QuantSpec(4, symmetric, "channel")
    weight = values(12, 128)
    grids = [weight_grid(w, spec, ranges) for w in (weight, factor * weight)]
    y, z = (
        dequantize_weight(quantize_weight(w, spec, g), spec)
        for w, g in zip((weight, factor * weight), grids, strict=True)
    )
    if factor in POWERS:
        assert torch.equal(z, factor * y)
    errors = [(a.double() / c - weight.double()).norm(dim=1) for a, c in ((y, 1.0), (z, factor))]
    torch.testing.assert_close(errors[1], errors[0], rtol=1e-3, atol=0)


def schemes() -> dict[str, LayerScheme]:
    plain, grouped = QuantSpec(4, granularity="channel"), QuantSpec(3, True, "group", 32)
    return {
        "nearest": LayerScheme(plain, None, rounding=Nearest()),
        "gptq": LayerScheme(plain, None, rounding=Gptq()),
        "gptq of groups": LayerScheme(grouped, None, rounding=Gptq(descending=False)),
        "adaround": LayerScheme(plain, None, rounding=AdaRound(30)),
        "block adaround": LayerScheme(plain, None, rounding=BlockAdaRound()),
        "low rank": LayerScheme(plain, None, low_rank=4),
        "low rank, gptq, lp": LayerScheme(plain, None, low_rank=4, rounding=Gptq(), ranges=LpSearch(2.0, 20)),
    }


@pytest.mark.parametrize("of_inputs", [1.0, 2.0**-40, 2.0**40])
@pytest.mark.parametrize("factor", POWERS + FACTORS)
@pytest.mark.parametrize("name", schemes())
def test_roundings_and_branches(name, factor, of_inputs):
    """All of what makes a weight; also where inputs are large or small."""
    scheme, weight = schemes()[name], values(12, 128)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 128, generator=generator) @ torch.randn(128, 128, generator=generator).triu()
    moments = x.T @ x if scheme.needs_moments else None

    def fitted(weight: Tensor, moments: Tensor | None) -> Tensor:
        found = Variant.fit(scheme, weight, Chain(), None, None if moments is None else moments.clone)
        out = found.dequantized_weight()
        return out if found.low_rank_up is None else out + found.low_rank_up @ found.low_rank_down

    plain = fitted(weight, moments)
    scaled = fitted(factor * weight, None if moments is None else moments * of_inputs**2)
    if factor in POWERS:
        assert torch.equal(scaled, factor * plain)
    errors = [float((a.double() / c - weight.double()).norm()) for a, c in ((plain, 1.0), (scaled, factor))]
    assert 0 < errors[1] == pytest.approx(errors[0], rel=0.1)  # one other code, and GPTQ answers it with others


class One(nn.Module):
    def __init__(self, weight_OC: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(weight_OC.shape[1], len(weight_OC), bias=False)
        self.linear.weight.data = weight_OC

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out


TRANSFORMS = {
    "smooth": (SmoothSpec(0.3),),
    "smooth, max, by segment": (SmoothSpec(0.7, per_segment=True, aggregate="max"),),
    "smooth, percentile": (SmoothSpec(0.5, aggregate="percentile"),),
    "auto": (SmoothSpec("auto"),),
    "salience": (SalienceSpec(),),
    "foldable": (FoldableSpec(0.5),),
    "scale and rotate": (SmoothSpec(0.5), RotateSpec()),
}


def answered(weight: Tensor, x: Tensor, transforms: tuple, activation: QuantSpec) -> Tensor:
    """The output of a quantized Linear, calibrated on what it reads."""
    model = One(weight.clone())
    with torch.no_grad(), Calibrator(model, ["linear"]) as calibrator:
        calibrator.set_sample_seeds([0, 1])
        for timestep in (100, 900):
            model(x * (1 + timestep / 1000), torch.tensor(timestep))
    recipe = Recipe(QuantSpec(6, granularity="channel"), activation, transforms, segments=(0, 0.5, 1))
    quantize_denoiser(model, recipe.resolve(["linear"]), calibrator.stats)
    with torch.no_grad():
        return model(x, torch.tensor(900))


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("activation", [QuantSpec(8, granularity="token", dynamic=True), QuantSpec(8)], ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_layers(name, activation, factor):
    """From statistics to outputs, of large and small weights and inputs."""
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 32)
    weight = values(12, 32)
    plain = answered(weight, x, TRANSFORMS[name], activation)
    assert 0 < (plain - x @ weight.T).norm() < 0.1 * (x @ weight.T).norm()
    for scaled in (
        answered(factor * weight, x, TRANSFORMS[name], activation),
        answered(weight, factor * x, TRANSFORMS[name], activation),
    ):
        assert (scaled.double() / factor - plain.double()).norm() < 0.02 * plain.double().norm()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_both_ends_of_float32(bits, symmetric):
    """Zeros come back as zeros and what is nearly zero as no more than it is; what is large does not overflow."""
    tiny = torch.finfo(torch.float32).smallest_normal
    rows = torch.tensor([[0.0] * 4, [-0.0] * 4, [1e-45, 0, 0, 0], [tiny, -tiny, 0, 1e-40], [1e38, -1e38, 5e37, 0]])
    lo, hi = rows.amin(1, True), rows.amax(1, True)
    scale, zero_point = compute_qparams(lo, hi, bits, symmetric)
    y = fake_quantize_own_range(rows, lo, hi, bits, symmetric)
    assert scale.isfinite().all() and (scale > 0).all() and zero_point.isfinite().all()
    assert y.isfinite().all() and not y[:2].any() and (y[2:4].abs() <= 2 * tiny).all()
    assert ((y[4] - rows[4]).abs() <= scale[4]).all()
    for bad in (torch.nan, torch.inf):
        broken = torch.tensor([[1.0, bad, 2.0]])
        assert (
            not fake_quantize_own_range(broken, broken.amin(1, True), broken.amax(1, True), bits, symmetric)
            .isfinite()
            .all()
        )
