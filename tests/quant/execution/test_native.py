"""The C++ kernels against `fake`: same codes, exact sums, every format, any shape."""

import copy

import pytest
import torch
import torch.nn.functional as F
from agreement import (
    DTYPES,
    activation_formats,
    assert_agrees,
    chains,
    exact_output,
    graphs_of_segments,
    layer_of,
    variant_of,
    weight_formats,
)

from viditq.errors import UserError
from viditq.quant import LayerScheme, QuantLinear, QuantSpec
from viditq.quant.execution.backends import NativeBackend, Unavailable, check_supported, get_backend
from viditq.quant.execution.backends.native import ops
from viditq.quant.execution.backends.native.layout import joined, pack_weight
from viditq.quant.execution.surroundings import After, Before
from viditq.quant.methods.quantizer import fake_quantize_activation, quantize_weight

TOKEN, CHANNEL = QuantSpec(8, False, "token", None, True), QuantSpec(8, False, "channel")
STATIC = QuantSpec(8)


@pytest.fixture(scope="module")
def backend() -> NativeBackend:
    try:
        ops.load()
    except Unavailable as error:
        if "failed" in error.reason:
            raise
        pytest.skip(error.reason)
    return NativeBackend()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("activation", activation_formats())
def test_agrees_with_fake_in_every_format(backend, activation):
    spec = activation_formats()[activation]
    for i, weight in enumerate(weight_formats().values()):
        dtype = DTYPES[i % 3]
        x, weight_OC = torch.randn(3, 7, 192).to(dtype), torch.randn(50, 192).to(dtype)
        assert_agrees(backend, variant_of(weight, spec, x, weight_OC), x, torch.randn(50).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 50), (77, 100, 50), (5, 9, 1), (129, 130, 65), (260, 64, 577)])
def test_any_shape(backend, shape, dtype):
    rows, in_features, out_features = shape
    x, weight = torch.randn(rows, in_features).to(dtype), torch.randn(out_features, in_features).to(dtype)
    for spec in (CHANNEL, QuantSpec(4, False, "channel"), QuantSpec(6, True, "tensor")):
        for activation in (TOKEN, STATIC, QuantSpec(8, True, "tensor", None, True)):
            assert_agrees(backend, variant_of(spec, activation, x, weight), x, None)


def test_rows_there_are_none_of_and_a_single_vector(backend):
    weight = torch.randn(50, 64)
    for spec in activation_formats().values():
        for x in (torch.randn(64), torch.randn(1, 64), torch.randn(2, 1, 64)):
            assert_agrees(backend, variant_of(CHANNEL, spec, torch.randn(4, 64), weight), x, torch.randn(50))
        variant = variant_of(CHANNEL, spec, torch.randn(4, 64), weight)
        backend.prepare(variant)
        for shape in ((0, 64), (2, 0, 64)):
            assert backend.linear(variant, torch.empty(shape), None).shape == (*shape[:-1], 50)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("spec", [TOKEN, QuantSpec(8, True, "token", None, True), STATIC], ids=str)
def test_extreme_scales(backend, scale, spec):
    for x_scale, weight_scale in ((scale, 1.0), (1.0, scale), (scale, 1 / scale)):
        x, weight = torch.randn(9, 64) * x_scale, torch.randn(50, 64) * weight_scale
        assert_agrees(backend, variant_of(CHANNEL, spec, x, weight), x, None)


def test_extreme_codes_and_rows_of_mixed_size(backend):
    x = torch.ones(70, 1152) * 10.0 ** torch.linspace(-20, 20, 70)[:, None]
    x[::2] *= -1
    weight = torch.where(torch.arange(1152) % 2 == 0, 1.0, -1.0).expand(66, -1).contiguous()
    for spec in (CHANNEL, QuantSpec(8, True, "channel"), QuantSpec(4, False, "group", 64)):
        assert_agrees(backend, variant_of(spec, TOKEN, x, weight), x, None)


@pytest.mark.parametrize("in_features", [17_000, 70_000])
def test_sums_of_more_than_22_bits_and_more_than_32_which_are_cut_into_parts(backend, in_features):
    x, weight = torch.full((2, in_features), 3.0), torch.full((3, in_features), -2.0)
    weight[:, 0] = 1e-3
    assert_agrees(backend, variant_of(CHANNEL, TOKEN, x, weight), x, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_are_those_of_fake_at_ties_and_beside_them(backend, bits, symmetric, dtype):
    """Each output is one code times its scale: the weight is a diagonal of 255 steps of 1."""
    steps = torch.arange(2 ** (bits + 1)) / 2
    rows = [steps, -steps, steps - steps.mean(), steps * (1 + 2**-8), torch.randn(len(steps)), steps / 3]
    x = torch.stack([row * size for row in rows for size in (1, 0.1, 3e-4, 7e5 if dtype != torch.float16 else 10)])
    spec = QuantSpec(bits, symmetric, "token", dynamic=True)
    variant = variant_of(QuantSpec(8, False, "channel"), spec, x.to(dtype), 255 * torch.eye(len(steps)))
    on_grid = fake_quantize_activation(x.to(dtype).float(), spec, None)
    backend.prepare(variant)
    torch.testing.assert_close(backend.linear(variant, x.to(dtype), None), 255 * on_grid, rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("-nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_stay_in_their_row(backend, bad, dtype):
    x, weight = torch.randn(5, 64).to(dtype), torch.randn(50, 64).to(dtype)
    for spec in (TOKEN, QuantSpec(8, True, "token", None, True), QuantSpec(4, False, "group", 32, True)):
        variant = variant_of(CHANNEL, spec, x, weight)
        backend.prepare(variant)
        spoilt = x.clone()
        spoilt[2, 5] = bad
        out, clean = backend.linear(variant, spoilt, None), backend.linear(variant, x, None)
        assert out[2].isnan().all()
        assert torch.equal(out[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low_rank", [None, 4])
def test_chains_and_the_low_rank_branch(backend, dtype, low_rank):
    x, weight = torch.randn(2, 9, 96).to(dtype), torch.randn(50, 96).to(dtype)
    for _, chain in chains(96):
        for spec in (TOKEN, QuantSpec(8, dynamic=True)):
            assert_agrees(backend, variant_of(CHANNEL, spec, x, weight, chain, low_rank), x, torch.randn(50).to(dtype))


def test_input_of_another_dtype_than_the_layer(backend):
    weight = torch.randn(50, 96)
    for dtype in (torch.bfloat16, torch.float64):
        assert_agrees(backend, variant_of(CHANNEL, TOKEN, weight, weight), torch.randn(4, 96).to(dtype), None)


def test_two_threads_compute_what_one_does(backend, threads):
    x, weight = torch.randn(2, 150, 192), torch.randn(300, 192)
    for spec in (TOKEN, QuantSpec(8, dynamic=True), QuantSpec(8, False, "group", 64, True)):
        for weights in (CHANNEL, QuantSpec(4, False, "group", 64)):
            variant = variant_of(weights, spec, x, weight)
            backend.prepare(variant)
            threads(1)
            one = backend.linear(variant, x, None)
            threads(2)
            assert torch.equal(backend.linear(variant, x, None), one)


def test_a_segment_left_in_float(backend):
    x, weight, bias = torch.randn(4, 96), torch.randn(50, 96), torch.randn(50)
    variant = variant_of(None, None, x, weight)
    backend.prepare(variant)
    assert torch.equal(backend.linear(variant, x, bias), F.linear(x, weight, bias))


def test_what_is_not_supported_is_named(backend):
    for weight, activation, field in (
        (CHANNEL, None, "activation"),
        (None, TOKEN, "weight"),
        (CHANNEL, QuantSpec(8, False, "channel"), "activation.granularity"),
    ):
        with pytest.raises(UserError, match=f"layer.*{field}="):
            check_supported(get_backend("native"), "layer", LayerScheme(weight, activation))


@pytest.mark.parametrize("weight", weight_formats())
def test_codes_lie_in_memory_once_and_come_back_for_the_state_dict(backend, weight):
    spec = weight_formats()[weight]
    variant = variant_of(spec, TOKEN, torch.randn(4, 128), torch.randn(128, 128))
    before, dense = copy.deepcopy(variant.state_dict()), variant.dequantized_weight()
    backend.prepare(variant)
    assert variant.qweight is None and variant.weight_scale is None and variant.weight_zero_point is None
    after = variant.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(variant.dequantized_weight(), dense)
    assert variant.held.data.numel() == 128 * 128 // (2 if spec.bits <= 4 else 1)
    backend.prepare(variant)  # another backend, or the same again, may take over
    assert all(torch.equal(before[k], v) for k, v in variant.state_dict().items())
    counted = backend.weight_bytes(variant.scheme, 128, 128, torch.float32)
    held = sum(tensor.nbytes for tensor in variant.held_tensors())
    assert held in (counted, counted - 128 * (128 // (spec.group_size or 128)))  # no zero points where all are 0


def test_segments_with_one_weight_hold_it_once(backend):
    x, weight = torch.randn(8, 96), torch.randn(50, 96)
    layer = NativeBackend()
    for other, shared in ((weight, True), (weight + 1e-2, False)):
        one, two = variant_of(CHANNEL, STATIC, x, weight), variant_of(CHANNEL, STATIC, 2 * x, other)
        layer.prepare(one)
        layer.prepare(two)
        assert (one.held is two.held) == shared
        assert_agrees(layer, two, x, None)


def reference(x, codes, bias, activation=lambda y: y, layernorm=False, mul=1.0, add=0.0, div=1.0):
    t = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) if layernorm else x.float()
    variant = variant_of(CHANNEL, TOKEN, x, codes)
    return activation(exact_output(variant, (t * mul + add) / div, bias)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_layernorm_modulation_activation_gate_and_residual_in_one_op(backend, dtype):
    x, weight, bias = torch.randn(2, 70, 192).to(dtype), torch.randn(100, 192), torch.randn(100)
    mul, add, gate = torch.randn(2, 1, 192), torch.randn(2, 1, 192), torch.randn(2, 1, 100)
    div, residual = torch.rand(192) + 0.5, torch.randn(2, 70, 100).to(dtype)
    packed = pack_weight(*quantize_weight(weight, CHANNEL)[:3], 8)
    functions = {
        "none": lambda y: y,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
        "gelu": F.gelu,
        "silu": F.silu,
    }
    for name, function in functions.items():
        y = ops.linear(
            x, packed, bias, TOKEN, layernorm_eps=1e-6, mul=mul, add=add, div=div, activation=name, gate=gate,
            residual=residual,
        )  # fmt: skip
        expected = residual + gate * reference(x, weight, bias, function, True, mul, add, div)
        # LayerNorm's own rounding flips a few codes by one, which moves an output by 1e-3 of its size at most
        difference = (y.double() - expected).norm() / expected.norm()
        assert difference < 3e-4 + torch.finfo(dtype).eps, (name, float(difference))


def test_views_and_other_dtypes_around_the_product(backend):
    """As blocks have them: parts of one modulation tensor in the model's dtype, a residual seen another way round."""
    x = torch.randn(2, 70, 96).bfloat16()
    packed = pack_weight(*quantize_weight(torch.randn(96, 96), CHANNEL)[:3], 8)
    shift, scale, gate = torch.randn(2, 3, 96).bfloat16().chunk(3, 1)
    strided = x.mT.contiguous().mT
    out = ops.linear(strided, packed, None, TOKEN, mul=scale, add=shift, gate=gate, residual=strided)
    parts = [part.float().contiguous() for part in (scale, shift, gate)]
    plain = ops.linear(x, packed, None, TOKEN, mul=parts[0], add=parts[1], gate=parts[2], residual=x)
    assert torch.equal(out, plain)


def test_a_zero_point_that_is_no_code_is_refused(backend):
    packed = pack_weight(*quantize_weight(torch.randn(8, 64), CHANNEL)[:3], 8)
    with pytest.raises(RuntimeError, match="300 is no code of 8 bits"):
        ops.linear(torch.randn(2, 64), packed, None, STATIC, (torch.ones(1), torch.tensor([300.0])))


@pytest.mark.parametrize("name", ["gelu_tanh", "gelu", "silu"])
def test_activation_functions(backend, name):
    """Of single values from -20 to 20, by a weight of one input."""
    values = torch.linspace(-20, 20, 4001)
    packed = pack_weight(*quantize_weight(torch.zeros(len(values), 1), CHANNEL)[:3], 8)
    y = ops.linear(torch.zeros(1, 1), packed, values, TOKEN, activation=name)[0]
    exact = values.double()
    expected = {
        "gelu_tanh": F.gelu(exact, approximate="tanh"),
        "gelu": F.gelu(exact),
        "silu": F.silu(exact),
    }[name]
    assert ((y - expected).abs() <= 4e-7 * exact.abs().clamp(min=1)).all()


def test_transform_is_what_linear_quantizes(backend):
    x, mul, add = torch.randn(2, 70, 192), torch.randn(2, 192), torch.randn(2, 192)
    div = torch.rand(192) + 0.5
    packed = pack_weight(*quantize_weight(torch.randn(100, 192), CHANNEL)[:3], 8)
    t = ops.transform(x, layernorm_eps=1e-5, mul=mul, add=add, div=div)
    expected = (F.layer_norm(x, (192,), eps=1e-5) * mul[:, None] + add[:, None]) / div
    torch.testing.assert_close(t, expected)
    whole = ops.linear(x, packed, None, TOKEN, layernorm_eps=1e-5, mul=mul, add=add, div=div)
    assert torch.equal(ops.linear(t, packed, None, TOKEN), whole)
    assert torch.equal(ops.transform(x, div=div), x / div)


@pytest.mark.parametrize("bits", [8, 4, 6])
def test_q_k_and_v_share_one_product(backend, bits):
    """As parts of one weight they give what each gives alone, and each still knows its own codes."""
    x, sizes = torch.randn(40, 96), (64, 128, 64)
    specs = [QuantSpec(bits, symmetric, "group", 32) for symmetric in (False, True, False)]
    quantized = [quantize_weight(torch.randn(size, 96), spec) for size, spec in zip(sizes, specs, strict=True)]
    weights = [pack_weight(*one[:3], bits, 32) for one in quantized]
    assert all(weight.joins(weights[0]) for weight in weights)
    out = ops.linear(x, joined(weights), None, TOKEN)
    alone = [ops.linear(x, weight, None, TOKEN) for weight in weights]
    assert torch.equal(out, torch.cat(alone, -1))
    data = joined(weights).data
    part = weights[1]._replace(data=data[1:3])
    assert torch.equal(part.codes(), quantized[1].codes) and part.data.data_ptr() == data[1:].data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", [TOKEN, STATIC, QuantSpec(8, dynamic=True), QuantSpec(4, False, "group", 32, True)])
def test_linears_of_one_input_with_smoothing_of_their_own(backend, spec, dtype):
    """To the bit what each gives alone: other widths, bits and groups, some without bias, smoothing or zero points."""
    x, mul, add = torch.randn(2, 35, 96).to(dtype), torch.randn(2, 96), torch.randn(2, 96)
    formats = [CHANNEL, QuantSpec(4, False, "group", 32), QuantSpec(8, True, "channel")]
    weights = [
        pack_weight(*quantize_weight(torch.randn(size, 96), one)[:3], one.bits, 32 if spec.group_size else None)
        for size, one in zip((64, 100, 7), formats, strict=True)
    ]
    biases, divs = [torch.randn(64), None, torch.randn(7)], [torch.rand(96) + 0.5, torch.rand(96) + 0.1, None]
    statics = [None if spec.dynamic else (torch.rand(1) / 50, torch.zeros(1)) for _ in weights]
    for around in ({}, {"layernorm_eps": 1e-6, "mul": mul, "add": add}):
        outs = ops.linears(x, weights, biases, spec, statics, divs, **around)
        for out, weight, bias, static, div in zip(outs, weights, biases, statics, divs, strict=True):
            assert torch.equal(out, ops.linear(x, weight, bias, spec, static, div=div, **around))
    empty = ops.linears(x[:0], weights, biases, spec, statics, divs)
    assert [out.shape for out in empty] == [(0, 35, 64), (0, 35, 100), (0, 35, 7)]


@pytest.mark.parametrize("kind", ["smooth", "both", "rotate"])
def test_products_of_one_input_equal_each_alone(backend, kind):
    """q, k and v with chains of their own: one call and one LayerNorm instead of three, and the same bits."""
    x, before = torch.randn(2, 20, 96).bfloat16(), Before(1e-6, torch.randn(2, 96), torch.randn(2, 96))
    variants = [variant_of(CHANNEL, TOKEN, x, torch.randn(64, 96).bfloat16(), dict(chains(96))[kind]) for _ in range(3)]
    for variant in variants:
        backend.prepare(variant)
    biases = [torch.randn(64), None, torch.randn(64)]
    alone = [backend.products([v], x, [b], before)[0] for v, b in zip(variants, biases, strict=True)]
    torch._dynamo.reset()
    for run in (backend.products, torch.compile(backend.products, backend="eager", fullgraph=True)):
        run(variants, x, biases, before)  # the compiler calls operators too
        with torch.profiler.profile() as profiler:
            together = run(variants, x, biases, before)
        called = [event.name for event in profiler.events() if event.name.startswith("viditq::")]
        assert called.count("viditq::linears" if kind == "smooth" else "viditq::transform") == 1
        assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


def test_scales_of_groups_that_float16_holds_are_kept_in_it(backend):
    """As files of other programs have them: fewer bytes, the same bits, and float32 again where they are asked for."""
    spec, x = QuantSpec(4, False, "group", 64), torch.randn(40, 128)
    codes, scale, zero_point = quantize_weight(torch.randn(128, 128), spec)[:3]
    rounded = scale.half().float()
    narrow, wide = pack_weight(codes, rounded, zero_point, 4), pack_weight(codes, scale, zero_point, 4)
    assert narrow.scale.dtype == torch.float16 and wide.scale.dtype == torch.float32
    assert sum(part.nbytes for part in narrow[:3]) == 128 * 2 * (32 + 2 + 1)
    back, counts = narrow.grid(spec)
    assert back.dtype == torch.float32 and torch.equal(back, rounded) and torch.equal(counts, zero_point)
    same = narrow._replace(scale=narrow.scale.float())
    assert torch.equal(ops.linear(x, narrow, None, TOKEN), ops.linear(x, same, None, TOKEN))
    both = joined([narrow, wide])
    alone = [ops.linear(x, one, None, TOKEN) for one in (narrow, wide)]
    assert both.scale.dtype == torch.float32 and torch.equal(ops.linear(x, both, None, TOKEN), torch.cat(alone, -1))


@pytest.mark.parametrize("low_rank", [None, 4])
def test_products_in_another_dtype_are_the_layers_own_rounded(backend, low_rank):
    """As attention reads q, k and v: joined, each with its smoothing, with a low-rank branch."""
    x, after = torch.randn(2, 20, 96), After(dtype=torch.bfloat16)
    for kind in ("none", "smooth", "both"):
        chain = dict(chains(96))[kind]
        variants = [variant_of(CHANNEL, TOKEN, x, torch.randn(64, 96), chain, low_rank) for _ in range(2)]
        for variant in variants:
            backend.prepare(variant)
        for some in (variants, variants[:1]):
            biases = [torch.randn(64), None][: len(some)]
            plain = backend.products(some, x, biases)
            narrow = backend.products(some, x, biases, after=after)
            assert all(torch.equal(one, other.bfloat16()) for one, other in zip(narrow, plain, strict=True))


def test_weights_of_other_widths_or_sizes_do_not_join(backend):
    def packed(size, bits, group):
        spec = QuantSpec(bits, False, "group", group)
        return pack_weight(*quantize_weight(torch.randn(size, 96), spec)[:3], bits)

    first = packed(64, 8, 32)
    assert not any(first.joins(other) for other in (packed(64, 4, 32), packed(64, 8, 48), packed(100, 8, 32)))


def quant_linear(spec: QuantSpec, chain=None) -> QuantLinear:
    x, weight = torch.randn(8, 96), torch.randn(50, 96)
    variants = [
        variant_of(CHANNEL, spec, x, weight, chain),
        variant_of(QuantSpec(4, False, "channel"), spec, x, weight),
    ]
    return layer_of(variants, NativeBackend(), torch.randn(50))


def test_one_graph_a_segment_under_torch_compile(backend):
    layer, x = quant_linear(TOKEN, dict(chains(96))["both"]), torch.randn(2, 8, 96)
    graphs = graphs_of_segments(layer, x)
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op.startswith("call")]
    assert not any("kron" in name or "cat" in name for name in called), "the rotation is built anew at every call"


def test_the_operator_describes_itself_rightly(backend):
    packed = pack_weight(*quantize_weight(torch.randn(50, 96), CHANNEL)[:3], 8)
    arguments = (*packed[:3], None, 50, 8, False, 1, False, None, None, -1.0, *[None] * 4, 0, None, None)
    for dtype in DTYPES:
        torch.library.opcheck(
            torch.ops.viditq.linear.default, (torch.randn(2, 3, 96), *arguments, dtype),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip
    several = ([packed.data] * 2, [packed.scale] * 2, [None] * 2, [None] * 2, [50, 50], 8, False, 1, False)
    rest = ([None] * 2, [None] * 2, 1e-6, None, None, [torch.ones(96), None], torch.bfloat16)
    torch.library.opcheck(
        torch.ops.viditq.linears.default, (torch.randn(2, 3, 96), *several, *rest),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    torch.library.opcheck(torch.ops.viditq.transform.default, (torch.randn(2, 96), 1e-6, None, None, None))


def test_arguments_that_do_not_fit_are_refused(backend):
    packed = pack_weight(*quantize_weight(torch.randn(50, 96), CHANNEL)[:3], 8)
    x = torch.randn(6, 96)
    with pytest.raises(RuntimeError, match="viditq::linear: bias"):
        ops.linear(x, packed, torch.ones(49), TOKEN)
    with pytest.raises(RuntimeError, match="viditq::linear: input_scale"):
        ops.linear(x, packed, None, STATIC, (torch.ones(2), torch.zeros(1)))
    for kwargs in ({"mul": torch.ones(4, 96)}, {"div": torch.ones(95)}, {"gate": torch.ones(6, 49)}, {"residual": x}):
        with pytest.raises(RuntimeError, match="viditq::linear"):
            ops.linear(x, packed, None, TOKEN, **kwargs)
    with pytest.raises(RuntimeError, match="does not fit"):
        ops.linear(torch.randn(6, 200), packed, None, TOKEN)
