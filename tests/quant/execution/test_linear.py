import pytest
import torch
import torch.nn.functional as F
from torch import nn

from viditq.errors import UserError
from viditq.quant import Chain, LayerScheme, QuantLinear, QuantSpec, Smooth, StepContext, Variant, get_backend
from viditq.quant.description.registry import BACKENDS
from viditq.quant.execution.backends import Backend, check_supported
from viditq.quant.execution.backends.auto import why_unavailable
from viditq.quant.execution.variant import empty_variant
from viditq.quant.methods.quantizer import fake_quantize_activation, static_qparams
from viditq.quant.numerics.affine import compute_qparams, dequantize, quantize
from viditq.quant.numerics.packing import packed_size

WEIGHTS = [
    None,
    *(
        QuantSpec(b, s, g, k)
        for b in (3, 4, 8)
        for s in (False, True)
        for g, k in [("tensor", None), ("channel", None), ("group", 16)]
    ),
]
ACTIVATIONS = [
    None,
    QuantSpec(8, False, "token", None, True),
    QuantSpec(4, True, "token", None, True),
    QuantSpec(8, dynamic=True),
]
ACTIVATIONS += [
    QuantSpec(8, False, "group", 16, True),
    QuantSpec(8),
    QuantSpec(8, True, "channel"),
    QuantSpec(6, False, "group", 16),
]

INTERPRETED = ("cuda", "triton")


def reference(x: torch.Tensor, scheme: LayerScheme, weight: torch.Tensor, s: torch.Tensor, bounds) -> torch.Tensor:
    """Plain, slow, float32: codes formed and turned back, group by group."""
    x, weight = x.float() / s, weight.float() * s
    if scheme.weight is not None:
        spec = scheme.weight
        blocks = weight.split(spec.group_size or 32, dim=1)
        out = []
        for block in blocks:
            rows = [block] if spec.granularity == "tensor" else list(block[:, None])
            out.append(torch.cat([round_trip(row, row.min(), row.max(), spec) for row in rows]))
        weight = torch.cat(out, 1)
    if scheme.activation is not None:
        spec, out = scheme.activation, []
        lo, hi = bounds[0] / s, bounds[1] / s
        for i, block in enumerate(x.split(1 if spec.granularity == "channel" else spec.group_size or 32, dim=-1)):
            part = slice(i * block.shape[-1], (i + 1) * block.shape[-1])
            if not spec.dynamic:
                out.append(round_trip(block, lo[part].min(), hi[part].max(), spec))
            elif spec.granularity == "tensor":
                out.append(torch.stack([round_trip(sample, sample.min(), sample.max(), spec) for sample in block]))
            else:
                rows = [round_trip(row, row.min(), row.max(), spec) for row in block.flatten(0, 1)]
                out.append(torch.stack(rows).view_as(block))
        x = torch.cat(out, -1)
    return F.linear(x, weight)


def round_trip(x: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    scale, zero_point = compute_qparams(lo, hi, spec.bits, spec.symmetric)
    return dequantize(quantize(x, scale, zero_point, spec.bits, spec.symmetric), scale, zero_point)


def make(scheme: LayerScheme, dtype: torch.dtype = torch.float32, backend: str = "fake"):
    torch.manual_seed(0)
    linear = nn.Linear(32, 12).to(dtype)
    x = (torch.randn(3, 5, 32) * torch.logspace(-1, 1, 32)).to(dtype)
    s = torch.rand(32) + 0.5
    bounds = (x.float().amin((0, 1)), x.float().amax((0, 1)))
    chain = Chain([Smooth(s)])
    grid = static_qparams(*chain.bounds(*bounds), scheme.activation) if scheme.static_activation else None
    variant = Variant.fit(scheme, linear.weight, chain, grid)
    layer = QuantLinear("layer", linear.bias, [variant], [0], 12, StepContext((0, 1)), get_backend(backend))
    layer.prepare()
    return layer, linear, x, s, bounds


def formats_of(backend: str, activation: QuantSpec | None) -> list[QuantSpec | None]:
    """Those of weights that the backend takes beside it; the test is skipped where it takes none or cannot run here."""
    weights = [weight for weight in WEIGHTS if get_backend(backend).supports(LayerScheme(weight, activation))]
    if not weights:
        pytest.skip(f"{backend} does not support this format")
    if (reason := why_unavailable(get_backend(backend))) is not None:
        pytest.skip(f"{backend} cannot run here: {reason}")
    return weights


def assert_is_the_reference(backend: str, weight: QuantSpec | None, activation: QuantSpec | None) -> None:
    scheme = LayerScheme(weight, activation)
    layer, linear, x, s, bounds = make(scheme, backend=backend)
    kept = x.clone()
    y = layer(x)
    assert torch.equal(x, kept)
    want = reference(x, scheme, linear.weight, s, bounds) + linear.bias
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4, msg=lambda text: f"{weight}: {text}")


@pytest.mark.parametrize("backend", BACKENDS.names())
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_format_on_every_backend(backend, activation):
    """Two of weights in turn where triton's interpreter stands for a GPU."""
    weights, place = formats_of(backend, activation), ACTIVATIONS.index(activation)
    few = [weights[(place + i * 7) % len(weights)] for i in range(2)]
    for weight in few if backend in INTERPRETED else weights:
        assert_is_the_reference(backend, weight, activation)


# Slow: every pair of formats, a tenth of a second each; test_integer_backends.py has others of them.
@pytest.mark.slow
@pytest.mark.parametrize("backend", INTERPRETED)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_pair_of_formats_in_triton(backend, activation):
    for weight in formats_of(backend, activation):
        assert_is_the_reference(backend, weight, activation)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_keep_their_dtype(dtype):
    scheme = LayerScheme(QuantSpec(4, granularity="channel"), QuantSpec(8, granularity="token", dynamic=True))
    layer, linear, x, s, bounds = make(scheme, dtype)
    y = layer(x)
    want = (reference(x, scheme, linear.weight, s, bounds) + linear.bias.float()).detach()
    assert y.dtype == dtype and layer.variants[0].weight_scale.dtype == torch.float32
    torch.testing.assert_close(y.float(), want, rtol=0.05, atol=0.02 * float(want.abs().max()))


def test_a_sample_does_not_depend_on_its_batch_mates():
    for activation in ACTIVATIONS:
        layer, _, x, _, _ = make(LayerScheme(QuantSpec(4), activation))
        alone = torch.cat([layer(sample[None]) for sample in x])
        torch.testing.assert_close(layer(x), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", [LayerScheme(w, a) for w in WEIGHTS for a in (None, QuantSpec(8))])
def test_the_empty_variant_has_the_same_tensors(scheme):
    layer, *_ = make(scheme)
    empty = empty_variant(scheme, 32, 12, torch.float32)
    shapes = {k: (v.shape, v.dtype) for k, v in layer.variants[0].state_dict().items() if not k.startswith("chain")}
    assert {k: (v.shape, v.dtype) for k, v in empty.state_dict().items()} == shapes
    assert all(v.is_meta for v in empty.state_dict().values())


def test_what_is_stored_is_packed():
    layer, *_ = make(LayerScheme(QuantSpec(3, granularity="channel"), None))
    state = layer.state_dict()
    assert state["variants.0.qweight"].shape == (12, packed_size(32, 3))
    assert not any("dense" in key for key in state)


def test_several_variants_need_a_noise_level():
    scheme = LayerScheme(QuantSpec(4), None)
    weight = torch.randn(4, 8)
    variants = [Variant.fit(scheme, weight * k, Chain()) for k in (1, 2)]
    context = StepContext((0, 0.3, 0.6, 1))
    layer = QuantLinear("blocks.0.fc", None, variants, [0, 1, 0], 4, context, get_backend("fake"))
    layer.prepare()
    with pytest.raises(UserError, match=r"blocks.0.fc holds 2 variants.*through its denoiser"):
        layer(torch.ones(1, 8))
    outputs = []
    for timestep in (100, 500, 900):
        context.set_timestep(timestep)
        outputs.append(layer(torch.ones(1, 8)))
    assert torch.equal(outputs[0], outputs[2])
    torch.testing.assert_close(outputs[1], 2 * outputs[0])
    assert "bits=['4/float', '4/float']" in repr(layer)


def test_backends_are_refused_by_name_and_by_field():
    names = "auto, cuda, fake, native, portable, scaled_mm, triton, weight_only"
    with pytest.raises(UserError, match=f"unknown backend 'fpga9000'; known names: {names}"):
        get_backend("fpga9000")

    class Picky(Backend):
        name = "picky"

        def unsupported_field(self, scheme):
            return "weight.bits"

        def prepare(self, variant): ...

        def linear(self, variant, x, bias): ...

    with pytest.raises(UserError, match=r"backend picky cannot run blocks.0: it does not support weight.bits=4"):
        check_supported(Picky(), "blocks.0", LayerScheme(QuantSpec(4), None))
    Picky.unsupported_field = lambda self, scheme: "activation"
    with pytest.raises(UserError, match=r"does not support activation=8 by token; choose"):
        check_supported(Picky(), "blocks.0", LayerScheme(QuantSpec(4), QuantSpec(8, granularity="token", dynamic=True)))


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_a_vector_is_one_token(granularity: str) -> None:
    spec, x = QuantSpec(8, granularity=granularity, dynamic=True), torch.randn(6)
    assert torch.equal(fake_quantize_activation(x, spec, None), fake_quantize_activation(x[None], spec, None)[0])


def test_integer_backends_refuse_floating_point_numbers_by_their_field():
    fp8, int8 = QuantSpec(8, True, "channel", number="e4m3"), QuantSpec(8, granularity="token", dynamic=True)
    fp8_token = QuantSpec(8, True, "token", dynamic=True, number="e5m2")
    for name in ("native", "portable", "triton"):
        backend = get_backend(name)
        assert backend.unsupported_field(LayerScheme(fp8, int8)) == "weight.number"
        assert backend.unsupported_field(LayerScheme(QuantSpec(8), fp8_token)) == "activation.number"
    assert get_backend("auto").resolve(LayerScheme(fp8, fp8_token)).name == "fake"
    assert get_backend("auto").resolve(LayerScheme(fp8, None)).name == "weight_only"
