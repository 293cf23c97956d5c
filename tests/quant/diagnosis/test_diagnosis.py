import copy
import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.models.generate import DtypeBoundary
from viditq.quant import Diagnosis, QuantPlan, QuantSpec, Recipe, SmoothSpec, linear_names, quantize_denoiser
from viditq.quant.diagnosis.diagnosis import predicted
from viditq.quant.diagnosis.error_sums import REDUCTIONS
from viditq.quant.execution.linear import quant_linears

W4, A8 = QuantSpec(4, granularity="channel"), QuantSpec(8, granularity="token", dynamic=True)
STEPS = [980, 640, 300, 10]  # buckets 19, 12, 5 and 0 of 20
REACHED = [0, 5, 12, 19]


def sample(denoiser: nn.Module, seeds: Sequence[int], steps: Sequence[int] = STEPS) -> list[Tensor]:
    """A sampling loop: a step's output leads to the next step's input."""
    x = torch.stack([torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    outputs = []
    with torch.no_grad():
        for step in steps:
            outputs.append(denoiser(x, timestep=torch.full((len(seeds),), step)))
            x = x - 0.1 * outputs[-1][..., :8]
    return outputs


def quantized_copy(denoiser: nn.Module, plan: QuantPlan, stats: Any = None) -> nn.Module:
    quantized = copy.deepcopy(denoiser)
    quantize_denoiser(quantized, plan, stats)
    return quantized


def diagnose(denoiser: nn.Module, quantized: nn.Module, plan: QuantPlan, *batches: Sequence[int]) -> Diagnosis:
    diagnosis = Diagnosis(denoiser, quantized, plan)
    for seeds in batches:
        with diagnosis:
            sample(denoiser, seeds)
        diagnosis.add_prompts(len(seeds))
    return diagnosis


def as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    roles = {name: "mlp" if "fc" in name else "other" for name in diagnosis.sums.layer_names}
    return json.loads(json.dumps(diagnosis.to_json(roles), allow_nan=False))


def relative(quantized: Tensor, exact: Tensor) -> float:
    return float(((quantized - exact).norm() / exact.norm()).detach())


def on_grid(x: Tensor, bits: int) -> Tensor:
    """Asymmetric min-max quantization of each row, from its definition."""
    lo, hi = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (hi - lo) / (2**bits - 1)
    zero_point = (-lo / scale).round()
    return (((x / scale).round() + zero_point).clamp(0, 2**bits - 1) - zero_point) * scale


def recorded(denoiser: nn.Module, name: str, seeds: Sequence[int]) -> list[Tensor]:
    """The inputs of one Linear, step by step."""
    inputs: list[Tensor] = []
    handle = denoiser.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    sample(denoiser, seeds)
    handle.remove()
    return inputs


def test_errors_are_those_computed_by_hand(denoiser):
    plan = Recipe(W4, A8).resolve(linear_names(denoiser))
    quantized = quantized_copy(denoiser, plan)
    result = as_json(diagnose(denoiser, quantized, plan, [1, 2, 3]))
    assert result["num_prompts"] == 3 and result["bucket_edges"] == [i / 20 for i in range(21)]
    assert list(result["layers"]) == list(plan.layers)
    for name, layer in result["layers"].items():
        linear, inputs = denoiser.get_submodule(name), recorded(denoiser, name, [1, 2, 3])
        exact = [linear(x) for x in inputs]
        wrong = [F.linear(on_grid(x, 8), on_grid(linear.weight, 4), linear.bias) for x in inputs]
        assert [k for k, value in enumerate(layer["relative_error"]) if value is not None] == REACHED
        for bucket, w, e, x in zip(REACHED[::-1], wrong, exact, inputs, strict=True):
            assert layer["relative_error"][bucket] == pytest.approx(relative(w, e), rel=1e-4)
            assert layer["minimum"][bucket] == float(x.min()) and layer["maximum"][bucket] == float(x.max())
            assert layer["amax"][bucket] == float(x.abs().max())
        assert layer["total"] == pytest.approx(relative(torch.cat(wrong), torch.cat(exact)), rel=1e-4)
        assert layer["minimum"][1] is layer["maximum"][1] is layer["amax"][1] is None
        assert (layer["weight_bits"], layer["activation_bits"]) == ([4], [8])
        assert layer["role"] == ("mlp" if "fc" in name else "other")


def test_the_denoisers_own_error_is_on_the_float_trajectory(denoiser):
    plan = Recipe(W4, A8).resolve(linear_names(denoiser))
    quantized = quantized_copy(denoiser, plan)
    result = as_json(diagnose(denoiser, quantized, plan, [1, 2]))["denoiser"]["relative_error"]
    exact = sample(denoiser, [1, 2])
    inputs = recorded(denoiser, "proj_in", [1, 2])
    for bucket, step, x, y in zip(REACHED[::-1], STEPS, inputs, exact, strict=True):
        assert result[bucket] == pytest.approx(relative(quantized(x, torch.full((2,), step)), y), rel=1e-5)
    assert sum(value is not None for value in result) == len(STEPS)


def test_samples_do_not_notice(denoiser):
    plan = Recipe(W4, A8).resolve(linear_names(denoiser))
    quantized = quantized_copy(denoiser, plan)
    before, random = sample(denoiser, [1, 2]), torch.get_rng_state()
    state = {name: value.clone() for name, value in quantized.state_dict().items()}
    with Diagnosis(denoiser, quantized, plan):
        during = sample(denoiser, [1, 2])
    assert all(torch.equal(a, b) for a, b in zip(before, during, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in quantized.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in denoiser.modules())


def test_float_in_a_segment_has_no_error_there(denoiser):
    plan = Recipe(W4, A8, segments=(0, 0.5, 1)).resolve(linear_names(denoiser))
    plan = QuantPlan(plan.edges, plan.schemes, {name: (None, names[1]) for name, names in plan.layers.items()})
    result = as_json(diagnose(denoiser, quantized_copy(denoiser, plan), plan, [1]))
    result["layers"].pop("time")  # one input feature: four bits hold it exactly
    for errors in (result["denoiser"], *result["layers"].values()):
        assert [errors["relative_error"][k] for k in (0, 5)] == [0, 0]
        assert all(errors["relative_error"][k] > 0.001 for k in (12, 19))
    layer = result["layers"]["blocks.0.fc1"]
    assert (layer["weight_bits"], layer["activation_bits"]) == ([16, 4], [16, 8])


def test_segments_use_their_own_variants(denoiser, calibrated):
    """Smoothing with one scale at low noise and another at high noise."""
    stats = calibrated(denoiser, [1, 2], STEPS)
    smoothing = SmoothSpec([0.1, 0.9], per_segment=True)
    plan = Recipe(W4, A8, smoothing, segments=(0, 0.5, 1)).resolve(linear_names(denoiser))
    quantized = quantized_copy(denoiser, plan, stats)
    result = as_json(diagnose(denoiser, quantized, plan, [1, 2]))
    name = "blocks.1.fc1"
    linear, variants = denoiser.get_submodule(name), quant_linears(quantized)[name].variants
    assert len(variants) == 2
    for bucket, segment, x in zip(REACHED[::-1], (1, 1, 0, 0), recorded(denoiser, name, [1, 2]), strict=True):
        errors = [
            relative(F.linear(on_grid(v.chain.activation(x), 8), v.dequantized_weight(), linear.bias), linear(x))
            for v in variants
        ]
        assert errors[0] != pytest.approx(errors[1], rel=0.01)
        assert result["layers"][name]["relative_error"][bucket] == pytest.approx(errors[segment], rel=1e-4)


def test_merged_parts_equal_one_pass_in_any_order(denoiser):
    plan = Recipe(W4, A8).resolve(linear_names(denoiser))
    quantized = quantized_copy(denoiser, plan)
    whole = diagnose(denoiser, quantized, plan, [1, 2, 3])
    parts = [diagnose(denoiser, quantized, plan, seeds) for seeds in ([1], [2, 3])]
    other = diagnose(denoiser, quantized, plan, [2, 3])
    parts[0].merge(parts[1])
    other.merge(diagnose(denoiser, quantized, plan, [1]))
    for merged in (parts[0], other):
        assert merged.state().keys() == whole.state().keys()
        for key, value in merged.state().items():
            torch.testing.assert_close(value, whole.state()[key], rtol=1e-6, atol=1e-7)
    assert int(parts[0].state()["num_prompts"]) == 3


def test_inference_mode(denoiser):
    """Lightning samples in it; what comes after is outside."""
    plan = Recipe(W4, A8).resolve(linear_names(denoiser))
    quantized = quantized_copy(denoiser, plan)
    with torch.inference_mode():
        inside = diagnose(denoiser, quantized, plan, [1])
        inside.merge(diagnose(denoiser, quantized, plan, [2]))
        state = inside.state()
    inside.merge(diagnose(denoiser, quantized, plan, [3]))
    later = Diagnosis(denoiser, quantized, plan)
    later.load_state(state)
    later.merge(diagnose(denoiser, quantized, plan, [3]))
    assert as_json(inside) == as_json(later) == as_json(diagnose(denoiser, quantized, plan, [1], [2], [3]))


def test_declared_reductions_merge_states(denoiser):
    """What a collective over processes does, key by key."""
    plan = Recipe(W4, A8).resolve(linear_names(denoiser))
    quantized = quantized_copy(denoiser, plan)
    states = [diagnose(denoiser, quantized, plan, seeds).state() for seeds in ([1], [2, 3])]
    reduce = {"sum": torch.sum, "min": torch.amin, "max": torch.amax}
    joined = {
        key: reduce[REDUCTIONS[key.rsplit("/", 1)[-1]]](torch.stack([state[key] for state in states]), 0)
        for key in states[0]
    }
    merged = Diagnosis(denoiser, quantized, plan)
    merged.load_state(joined)
    assert as_json(merged) == as_json(diagnose(denoiser, quantized, plan, [1], [2, 3]))


def test_resumes_from_a_saved_state(denoiser):
    plan = Recipe(W4, A8).resolve(linear_names(denoiser))
    quantized = quantized_copy(denoiser, plan)
    first = diagnose(denoiser, quantized, plan, [1, 2])
    later = Diagnosis(denoiser, quantized, plan)
    later.load_state({key: value.clone() for key, value in first.state().items()})
    assert all(torch.equal(value, first.state()[key]) for key, value in later.state().items())
    with later:
        sample(denoiser, [3])
    later.add_prompts(1)
    assert as_json(later) == as_json(diagnose(denoiser, quantized, plan, [1, 2], [3]))
    with pytest.raises(UserError, match="other layers or sizes than this plan; delete it"):
        Diagnosis(denoiser, quantized, plan, num_buckets=10).load_state(first.state())


def test_the_state_does_not_grow(denoiser):
    plan = Recipe(W4, A8).resolve(linear_names(denoiser))
    quantized = quantized_copy(denoiser, plan)
    sizes = [
        sum(value.numel() for value in diagnose(denoiser, quantized, plan, *batches).state().values())
        for batches in ([[1]], [[1, 2, 3], [4]])
    ]
    assert sizes[0] == sizes[1]


def test_half_precision_beside_float(denoiser):
    """The quantized denoiser runs in float16 behind a boundary; the error is still that against float32."""
    plan = Recipe(QuantSpec(8, granularity="channel"), A8).resolve(linear_names(denoiser))
    errors = []
    for half in (False, True):
        quantized = copy.deepcopy(denoiser)
        if half:
            quantized.half()
        quantize_denoiser(quantized, plan, None)
        if half:
            DtypeBoundary(quantized, torch.float16, torch.float32)
        result = as_json(diagnose(denoiser, quantized, plan, [1]))
        errors.append([result["denoiser"]["relative_error"][19], result["layers"]["blocks.0.fc1"]["total"]])
    assert errors[0] != errors[1]
    assert errors[1] == pytest.approx(errors[0], rel=0.2)


@pytest.mark.parametrize("wrap", [lambda y: (y, None), lambda y: SimpleNamespace(sample=y)])
def test_outputs_as_diffusers_returns_them(denoiser, wrap):
    plan = Recipe(W4, A8).resolve(linear_names(denoiser))
    quantized = quantized_copy(denoiser, plan)
    want = as_json(diagnose(denoiser, quantized, plan, [1]))

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.proj_in, self.blocks, self.time, self._call = inner.proj_in, inner.blocks, inner.time, inner.forward

        def forward(self, hidden_states: Tensor, timestep: Tensor) -> Any:
            return wrap(self._call(hidden_states, timestep))

    wrapped, wrapped_quantized = Wrapped(denoiser), Wrapped(quantized)
    for context in {layer.context for layer in quant_linears(quantized).values()}:
        context.attach(wrapped_quantized)
    diagnosis = Diagnosis(wrapped, wrapped_quantized, plan)
    with diagnosis, torch.no_grad():
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))[None]
        wrapped(x, timestep=torch.full((1,), 980))
    diagnosis.add_prompts(1)
    assert as_json(diagnosis)["denoiser"]["relative_error"][19] == want["denoiser"]["relative_error"][19]


def test_a_learned_variance_does_not_count():
    output, latents, text = torch.randn(2, 8, 3, 4), torch.randn(2, 4, 3, 4), torch.randn(2, 5, 6)
    assert torch.equal(predicted((output,), [text, latents]), output[:, :4])
    assert predicted(output, [text, torch.randn(2, 8, 3, 4)]) is output
    with pytest.raises(UserError, match="the denoiser returned dict"):
        predicted({}, [])


def test_what_does_not_belong_together_is_refused(denoiser, make_denoiser):
    names = linear_names(denoiser)
    plan = Recipe(W4, A8).resolve(names)
    quantized = quantized_copy(denoiser, plan)
    with pytest.raises(UserError, match=r"not made by this plan: they differ in proj_in"):
        Diagnosis(denoiser, quantized, Recipe(W4, A8).resolve(names[1:]))
    with pytest.raises(UserError, match="its segments are others"):
        Diagnosis(denoiser, quantized, Recipe(W4, A8, segments=(0, 0.5, 1)).resolve(names))
    with pytest.raises(UserError, match=r"the float denoiser has no Linear 'blocks.0.fc3'"):
        Diagnosis(denoiser, quantized, QuantPlan(plan.edges, plan.schemes, {"blocks.0.fc3": ("w4a8",)}))
    shared = make_denoiser()
    only_time = Recipe(W4, A8).resolve(["time"])
    quantized = quantized_copy(shared, only_time)
    shared.blocks = quantized.blocks
    with pytest.raises(UserError, match="share modules; quantize a copy"):
        Diagnosis(shared, quantized, only_time)


def test_an_empty_diagnosis_or_role_is_refused(denoiser):
    plan = Recipe(W4, A8).resolve(linear_names(denoiser))
    quantized = quantized_copy(denoiser, plan)
    with pytest.raises(UserError, match="nothing was diagnosed yet"):
        as_json(Diagnosis(denoiser, quantized, plan))
    with pytest.raises(UserError, match=r"6 layers have no role, first proj_in"):
        diagnose(denoiser, quantized, plan, [1]).to_json({})


def test_an_unbounded_output_names_the_layer(denoiser):
    plan = Recipe(W4, A8).resolve(linear_names(denoiser))
    quantized = quantized_copy(denoiser, plan)
    quant_linears(quantized)["blocks.1.fc1"].bias.data.fill_(torch.inf)
    with pytest.raises(UserError, match=r"output of layer blocks.1.fc1 is not finite"):
        diagnose(denoiser, quantized, plan, [1])
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in denoiser.modules())


def test_a_plan_without_layers(denoiser):
    plan = QuantPlan((0, 1), {}, {})
    result = as_json(diagnose(denoiser, copy.deepcopy(denoiser), plan, [1]))
    assert result["layers"] == {} and [result["denoiser"]["relative_error"][k] for k in REACHED] == [0] * 4


class Remembering(nn.Module):
    """Attends, after a stream that has no tokens at first, to what it has written down (keys of earlier frames)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.older, self.out = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, timestep: Tensor, older: Tensor, cache: dict[int, list[Tensor]], predict: bool) -> Any:
        mine = self.fc(x)
        seen = torch.cat([*cache[0], self.older(older), mine], 1)
        cache[0].append(mine)
        cache[1][0].add_(mine.mean())
        return (self.out(x + torch.softmax(mine @ seen.mT, -1) @ seen + cache[1][0]) if predict else None, cache)


def remember(denoiser: nn.Module) -> list[Tensor]:
    cache: dict[int, list[Tensor]] = {0: [], 1: [torch.zeros(1)]}
    x, outputs = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)), []
    with torch.no_grad():
        for i, step in enumerate(STEPS):
            told = {"timestep": torch.full((2,), step), "older": x[:, : 2 * (i > 1)], "cache": cache}
            outputs.append(denoiser(x, **told, predict=True)[0])
            x = x - 0.1 * outputs[-1]
            denoiser(x, **told, predict=False)
    return outputs


def test_a_stream_without_tokens_and_a_cache_that_is_written_into() -> None:
    """The quantized denoiser reads what the float one read, and writes into a cache of its own."""
    torch.manual_seed(0)
    denoiser = Remembering()
    plan = Recipe(W4, A8).resolve(linear_names(denoiser))
    diagnosis = Diagnosis(denoiser, quantized_copy(denoiser, plan), plan)
    expected = remember(denoiser)
    with diagnosis:
        for mine, plain in zip(remember(denoiser), expected, strict=True):
            assert torch.equal(mine, plain)
    diagnosis.add_prompts(2)
    layers = as_json(diagnosis)["layers"]
    assert all(0.01 < layer["total"] < 0.3 for layer in layers.values())
    assert [i for i, e in enumerate(layers["older"]["relative_error"]) if e is not None] == REACHED[:2]
    assert layers["older"]["amax"][19] is None and layers["older"]["amax"][0] > 0
