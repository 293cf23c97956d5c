import pytest
import torch
from torch import nn

from viditq.errors import UserError
from viditq.quant import (
    CalibrationStats,
    QuantLinear,
    QuantPlan,
    QuantSpec,
    Recipe,
    RotateSpec,
    Rule,
    SmoothSpec,
    linear_names,
    quantize_denoiser,
)
from viditq.quant.execution.linear import quant_linears

W8, W4 = QuantSpec(8, granularity="channel"), QuantSpec(4, granularity="channel")
A8, A8_STATIC = QuantSpec(8, granularity="token", dynamic=True), QuantSpec(8)
STEPS = [980, 640, 300, 10]


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


def test_linear_names_skips_what_attention_reads_itself():
    model = nn.ModuleDict({"fc": nn.Linear(2, 2), "attn": nn.MultiheadAttention(4, 2)})
    assert linear_names(model) == ["fc"]


@pytest.mark.parametrize("activation", [None, A8, A8_STATIC])
@pytest.mark.parametrize(
    "smoothing",
    [
        None,
        SmoothSpec(0.5),
        SmoothSpec([0.3, 0.6], True),
        SmoothSpec("auto", True),
        RotateSpec(),
        [SmoothSpec("auto"), RotateSpec(1)],
    ],
)
def test_output_stays_close_at_eight_bits(denoiser, make_denoiser, calibrated, activation, smoothing):
    names = linear_names(denoiser)
    stats = calibrated(denoiser, [1, 2], STEPS)
    plan = Recipe(W8, activation, smoothing, segments=(0, 0.5, 1)).resolve(names)
    x = torch.randn(2, 5, 8)
    want = [denoiser(x, torch.full((2,), t)) for t in (10, 900)]
    quantize_denoiser(denoiser, plan, stats)
    assert list(quant_linears(denoiser)) == names
    for t, y in zip((10, 900), want, strict=True):
        assert 0 < relative_error(denoiser(x, torch.full((2,), t)), y) < 0.1


def test_more_bits_are_better(make_denoiser):
    errors = []
    for bits in (2, 3, 4, 6, 8):
        torch.manual_seed(0)
        denoiser = make_denoiser()
        x, t = torch.randn(2, 5, 8), torch.zeros(2)
        want = denoiser(x, t)
        plan = Recipe(QuantSpec(bits, granularity="channel"), None).resolve(linear_names(denoiser))
        quantize_denoiser(denoiser, plan, None)
        errors.append(relative_error(denoiser(x, t), want))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("ranges", ["min_max", "lp"])
@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
def test_rounding_by_output_error_helps_the_layers(denoiser, make_denoiser, calibrated, rounding, ranges):
    """On the inputs that calibration saw, layer by layer, behind a chain, against nearest on the same grid."""
    stats, seen = calibrated(denoiser, [1, 2], STEPS), {}
    for name in ("blocks.0.fc1", "blocks.1.fc2"):
        denoiser.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
    denoiser(torch.randn(2, 5, 8), torch.full((2,), 300))
    errors = {}
    for how in ("nearest", rounding):
        torch.manual_seed(0)
        model = make_denoiser()
        chain = [SmoothSpec(0.5), RotateSpec()]
        quantize_denoiser(model, Recipe(W4, None, chain, how, ranges=ranges).resolve(linear_names(model)), stats)
        errors[how] = sum(
            float((model.get_submodule(n)(x) - denoiser.get_submodule(n)(x)).square().sum().detach())
            for n, x in seen.items()
        )
    assert errors[rounding] < 0.8 * errors["nearest"]


def test_segments_that_cannot_differ_share_a_variant(denoiser, calibrated):
    stats = calibrated(denoiser, [1], STEPS)
    rules = [
        Rule("blocks.0.*", smoothing=SmoothSpec(0.5, per_segment=True)),
        Rule("time", activation=A8_STATIC),
    ]
    plan = Recipe(W4, A8, SmoothSpec(0.5), segments=(0, 0.4, 0.7, 1), rules=rules).resolve(linear_names(denoiser))
    quantize_denoiser(denoiser, plan, stats)
    counts = {name: len(layer.variants) for name, layer in quant_linears(denoiser).items()}
    assert counts == {
        "proj_in": 1,
        "blocks.0.fc1": 3,
        "blocks.0.fc2": 3,
        "blocks.1.fc1": 1,
        "blocks.1.fc2": 1,
        "time": 3,
    }


def test_a_segment_may_stay_in_float(denoiser, make_denoiser):
    torch.manual_seed(0)
    float_denoiser = make_denoiser()
    plan = Recipe(W4, A8, segments=(0, 0.5, 1)).resolve(linear_names(denoiser))
    plan = QuantPlan(plan.edges, plan.schemes, {name: (None, names[1]) for name, names in plan.layers.items()})
    quantize_denoiser(denoiser, plan, None)
    x = torch.randn(2, 5, 8)
    for t, equal in ((100, True), (900, False)):
        assert torch.equal(denoiser(x, torch.full((2,), t)), float_denoiser(x, torch.full((2,), t))) == equal


def test_static_smoothing_uses_all_noise_levels_and_the_other_each_segments(denoiser, calibrated):
    stats = calibrated(denoiser, [1], STEPS)
    weight = denoiser.blocks[0]["fc1"].weight.detach().clone()
    for per_segment, (lo, hi) in ((False, (0, 1)), (True, (0.5, 1))):
        spec = SmoothSpec(0.5, per_segment)
        want = spec.fit(weight, stats.segment("blocks.0.fc1", lo, hi), None).scale
        torch.manual_seed(0)
        model = type(denoiser)()
        plan = Recipe(W4, A8, spec, segments=(0, 0.5, 1)).resolve(linear_names(model))
        quantize_denoiser(model, plan, stats)
        assert torch.equal(model.blocks[0]["fc1"].variants[-1].chain[0].scale, want)


def test_the_weight_is_quantized_once_after_the_chain(denoiser, calibrated):
    stats = calibrated(denoiser, [1], STEPS)
    weight = denoiser.proj_in.weight.detach().clone()
    quantize_denoiser(denoiser, Recipe(W8, A8, SmoothSpec(0.5)).resolve(linear_names(denoiser)), stats)
    variant = denoiser.proj_in.variants[0]
    error = (variant.dequantized_weight() - weight * variant.chain[0].scale).abs()
    assert (error <= variant.weight_scale * 0.501 + 1e-7).all()


def test_a_shared_linear_stays_shared():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.inner = nn.ModuleList([self.a])

        def forward(self, x, timestep):
            return self.inner[0](self.a(x))

    model = Shared()
    assert linear_names(model) == ["a"]
    quantize_denoiser(model, Recipe(W4, None).resolve(["a"]), None)
    assert model.a is model.inner[0] and isinstance(model.a, QuantLinear)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_weights_names_the_layer_and_changes_nothing(denoiser, bad):
    denoiser.blocks[1]["fc2"].weight.data[0, 0] = bad
    with pytest.raises(UserError, match=r"the weight of blocks.1.fc2 contains NaN or inf"):
        quantize_denoiser(denoiser, Recipe(W4, A8).resolve(linear_names(denoiser)), None)
    assert not quant_linears(denoiser)


def test_refusals_change_nothing(denoiser, calibrated):
    names = linear_names(denoiser)
    some = calibrated(denoiser, [1], STEPS, names[:2])
    early = calibrated(denoiser, [1], [980])
    smooth = Recipe(W4, A8, SmoothSpec(0.5, True), segments=(0, 0.5, 1)).resolve(names)
    bare = CalibrationStats(calibrated(denoiser, [1], STEPS).layers)
    cases = [
        (Recipe(W4, A8, rounding="gptq").resolve(names), None, "needs calibration statistics"),
        (Recipe(W4, A8, rounding="gptq").resolve(names), bare, "lack the second moments of proj_in"),
        (
            Recipe(W4, A8).resolve(["blocks.0.fc3"]),
            None,
            "blocks.0.fc3, which is no Linear of the model; close names",
        ),
        (smooth, None, "needs calibration statistics"),
        (smooth, some, "the statistics lack the layer blocks.0.fc2"),
        (smooth, early, "no calibration data for proj_in at noise levels 0 to 0.5"),
        (
            Recipe(QuantSpec(4, granularity="group", group_size=7), A8).resolve(names),
            None,
            "proj_in has 8 input features",
        ),
        (
            Recipe(W4, QuantSpec(8, False, "group", 16, True)).resolve(names),
            None,
            "which group_size=16 does not divide",
        ),
    ]
    for plan, stats, message in cases:
        with pytest.raises(UserError, match=message):
            quantize_denoiser(denoiser, plan, stats)
        assert not quant_linears(denoiser)
    with pytest.raises(UserError, match="unknown backend 'tpu'"):
        quantize_denoiser(denoiser, Recipe(W4, A8).resolve(names), None, backend="tpu")
