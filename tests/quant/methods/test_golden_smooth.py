"""Timestep-aware smoothing of one Linear against numbers of the original public code.

It ran its calibration from t = 0 up and averaged in that order, as `ema_from="clean"` does. By default we average
from high noise down: most tests feed t as noise level 1 - t / 1000. Its token scales are shared over the batch;
`shared_tokens` emulates that with our own tensors, laying the batch out along the features.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from viditq.quant import CalibrationStats, Calibrator, QuantSpec, Recipe, SmoothSpec, quantize_denoiser
from viditq.quant.execution.linear import QuantLinear
from viditq.quant.execution.variant import Variant
from viditq.quant.methods.quantizer import fake_quantize_activation

TWO = (0, 0.4995, 1)  # t = 501 .. 1000, t = 0 .. 500
CASES = {
    "alpha0.11/two": (0.11, TWO),
    "alpha0.11_0.3/two": ((0.3, 0.11), TWO),
    "alpha0.3/two": (0.3, TWO),
    "alpha0.625/two": (0.625, TWO),
    "alphascalar0.3/two": (0.3, TWO),
    "alphascalar0.3/one": (0.3, (0, 1)),
}
BITS = {"w4a8": (4, 8), "w6a6": (6, 6), "w8a8": (8, 8)}
with safe_open(Path(__file__).parents[2] / "data" / "golden" / "smooth.safetensors", "pt") as file:
    KEYS = set(file.keys())
GIVEN = [(case, bits) for case in CASES for bits in BITS if f"{case}/{bits}/y" in KEYS]


class One(nn.Module):
    def __init__(self, golden: dict[str, Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 32)
        self.linear.weight.data = golden["W"].clone()
        self.linear.bias.data = golden["b"].clone()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.linear(x)


def as_level(t: Tensor) -> Tensor:
    return 1000 - t


def calibrate(golden: dict[str, Tensor], order: list[int]) -> CalibrationStats:
    model = One(golden)
    with Calibrator(model, ["linear"], num_buckets=2000) as calibrator:
        calibrator.set_sample_seeds([0, 1])
        for i in order:
            model(golden["calib_x"][i], as_level(golden["calib_t"][i]))
    return calibrator.stats


def quantized(golden: dict[str, Tensor], case: str, bits: tuple[int, int]) -> One:
    alpha, segments = CASES[case]
    recipe = Recipe(
        QuantSpec(bits[0], granularity="channel"),
        QuantSpec(bits[1], granularity="token", dynamic=True),
        SmoothSpec(alpha, per_segment=True),
        segments=segments,
    )
    model = One(golden)
    quantize_denoiser(model, recipe.resolve(["linear"]), calibrate(golden, list(range(12))))
    return model


def variant_of_range(model: One, index: int) -> Variant:
    layer = model.linear
    assert isinstance(layer, QuantLinear)
    return layer.variants[len(layer.variants) - 1 - index]


def shared_tokens(variant: Variant, x_BNC: Tensor) -> Tensor:
    """What enters the product when the batch shares its token scales."""
    laid = variant.chain.activation(x_BNC).transpose(0, 1).flatten(1)[None]
    return fake_quantize_activation(laid, variant.scheme.activation, None)[0].unflatten(-1, (2, -1)).transpose(0, 1)


def test_the_statistic_after_each_batch(golden_smooth):
    for upto in range(1, 13):
        stats = calibrate(golden_smooth, list(range(upto)))
        trace = golden_smooth["alpha0.11/two/w8a8/act_scale_trace"][upto - 1, :, 0]
        for index in range(2 if upto > 6 else 1):
            lo, hi = TWO[1 - index], TWO[2 - index]
            torch.testing.assert_close(stats.segment("linear", lo, hi).amax(), trace[index], rtol=1e-6, atol=0)


UP = (0, 0.5005, 1)  # t = 0 .. 500, t = 501 .. 1000


def calibrate_as_it_is(golden: dict[str, Tensor], num_buckets: int) -> CalibrationStats:
    """t as noise level t / 1000."""
    model = One(golden)
    with Calibrator(model, ["linear"], num_buckets=num_buckets) as calibrator:
        calibrator.set_sample_seeds([0, 1])
        for x, t in zip(golden["calib_x"], golden["calib_t"], strict=True):
            model(x, t)
    return calibrator.stats


@pytest.mark.parametrize("bits", [bits for bits in BITS if ("alpha0.11_0.3/two", bits) in GIVEN])
def test_in_the_order_of_the_original(golden_smooth, bits):
    golden, prefix = golden_smooth, f"alpha0.11_0.3/two/{bits}"
    stats = calibrate_as_it_is(golden, 2000)
    other_way = [stats.segment("linear", *UP[i : i + 2]).amax() for i in range(2)]
    spec = SmoothSpec((0.11, 0.3), per_segment=True, ema_from="clean")
    model = One(golden)
    recipe = Recipe(QuantSpec(BITS[bits][0], granularity="channel"), None, spec, segments=UP)
    quantize_denoiser(model, recipe.resolve(["linear"]), stats)
    for index, variant in enumerate(model.linear.variants):
        amax_C = stats.segment("linear", *UP[index : index + 2]).amax(ema_from="clean")
        wanted = golden[f"{prefix}/act_scale"][index, 0]
        torch.testing.assert_close(amax_C, wanted, rtol=1e-6, atol=0)
        assert ((other_way[index] - wanted).abs() / wanted).max() > 0.01
        torch.testing.assert_close(
            variant.chain[0].scale, golden[f"{prefix}/channel_wise_scale"][index, 0], rtol=2e-6, atol=0
        )


def test_steps_that_share_a_bucket_count_as_one(golden_smooth):
    """12 steps in 4 buckets: a running mean over four means."""
    golden, stats = golden_smooth, calibrate_as_it_is(golden_smooth, 4)
    each = golden["calib_x"].abs().amax(2).mean(1)
    level = golden["calib_t"] / 1000
    means = [
        each[(level > lo) & (level <= lo + 0.25) | ((level == 0) & (lo == 0))].mean(0) for lo in (0, 0.25, 0.5, 0.75)
    ]
    for ema_from, order in (("clean", means), ("noise", means[::-1])):
        wanted = order[0]
        for mean in order[1:]:
            wanted = 0.95 * wanted + 0.05 * mean
        torch.testing.assert_close(stats.segment("linear", 0, 1).amax(ema_from=ema_from), wanted, rtol=1e-5, atol=0)


def test_the_statistic_does_not_depend_on_the_order_of_batches(golden_smooth):
    forward, backward = (
        calibrate(golden_smooth, list(range(12))),
        calibrate(golden_smooth, list(range(12))[::-1]),
    )
    for key, value in forward.to_tensors().items():
        assert torch.equal(value, backward.to_tensors()[key]), key


@pytest.mark.parametrize(("case", "bits"), GIVEN)
def test_scales_weights_and_outputs(golden_smooth, case, bits):
    golden, prefix = golden_smooth, f"{case}/{bits}"
    model = quantized(golden, case, BITS[bits])
    for index in range(len(golden[f"{prefix}/act_scale"])):
        variant = variant_of_range(model, index)
        s = variant.chain[0].scale
        torch.testing.assert_close(s, golden[f"{prefix}/channel_wise_scale"][index, 0], rtol=2e-6, atol=0)
        row = {4: 0, 6: 1, 8: 2}[BITS[bits][0]]
        torch.testing.assert_close(variant.weight_scale, golden[f"{prefix}/w_delta_list"][row, index])
        assert torch.equal(variant.weight_zero_point.float(), golden[f"{prefix}/w_zero_point_list"][row, index])
    for i, t in enumerate(golden["test_t"].tolist()):
        variant = variant_of_range(model, 0 if t <= 500 or case.endswith("one") else 1)
        torch.testing.assert_close(variant.dequantized_weight(), golden[f"{prefix}/w_quant"][i])
        x = shared_tokens(variant, golden["test_x"][i])
        torch.testing.assert_close(x, golden[f"{prefix}/x_quant"][i], rtol=1e-5, atol=1e-5)
        y = F.linear(x, variant.dequantized_weight(), golden["b"])
        torch.testing.assert_close(y, golden[f"{prefix}/y"][i], rtol=1e-4, atol=1e-4)


def test_forward_picks_the_range_and_has_its_own_token_scales(golden_smooth):
    """Per-token scales for each sample: never worse than half a step more than the shared ones."""
    golden, prefix = golden_smooth, "alpha0.11/two/w8a8"
    model = quantized(golden, "alpha0.11/two", (8, 8))
    for i, t in enumerate(golden["test_t"]):
        x, variant = golden["test_x"][i], variant_of_range(model, 0 if t <= 500 else 1)
        y = model(x, as_level(t))
        alone = torch.cat([model(sample[None], as_level(t)) for sample in x])
        torch.testing.assert_close(y, alone, rtol=1e-5, atol=1e-5)
        own = fake_quantize_activation(variant.chain.activation(x), variant.scheme.activation, None)
        torch.testing.assert_close(y, F.linear(own, golden[f"{prefix}/w_quant"][i], golden["b"]), rtol=1e-4, atol=1e-4)
        assert (y - golden["fp_y"][i]).norm() <= 1.05 * (golden[f"{prefix}/y"][i] - golden["fp_y"][i]).norm()


def test_without_smoothing(golden_smooth):
    golden, model = golden_smooth, One(golden_smooth)
    recipe = Recipe(QuantSpec(4, granularity="channel"), QuantSpec(8, granularity="token", dynamic=True))
    quantize_denoiser(model, recipe.resolve(["linear"]), None)
    variant = model.linear.variants[0]
    y = F.linear(shared_tokens(variant, golden["test_x"][0]), variant.dequantized_weight(), golden["b"])
    torch.testing.assert_close(y, golden["no_smooth/w4a8/y"][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["spatial", "temporal", "cross_q", "cross_kv"])
def test_a_sample_is_one_element_of_the_leading_axis(golden_smooth, kind):
    """Spatial inputs are [B T, S, C], temporal ones [B S, T, C]: the original averages over all of those."""
    golden, linear = golden_smooth, nn.Linear(32, 32)
    model = One(golden)
    model.linear = linear
    with Calibrator(model, ["linear"], num_buckets=2000) as calibrator:
        for x, t in zip(golden[f"stdit/{kind}/calib_x"], golden[f"stdit/{kind}/calib_t"], strict=True):
            calibrator.set_sample_seeds(range(len(x)))
            model(x, as_level(t))
    for index, want in enumerate(golden[f"stdit/{kind}/act_scale"]):
        got = calibrator.stats.segment("linear", TWO[1 - index], TWO[2 - index]).amax()
        torch.testing.assert_close(got, want[0], rtol=1e-6, atol=0)
