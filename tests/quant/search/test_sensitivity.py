"""Swapping in place, replaying float outputs, and proxies."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.quant import QuantPlan, Recipe, linear_names, quantize_denoiser
from viditq.quant.calibration.context import StepContext
from viditq.quant.calibration.step_shares import step_shares
from viditq.quant.description.blocks import block_of
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.methods.transforms import SmoothSpec
from viditq.quant.search.candidates import (
    Candidate,
    Group,
    candidate_plan,
    candidates_of,
    check_choices,
    groups_of,
)
from viditq.quant.search.proxy import OneStep, errors_on_rows, proxy_errors
from viditq.quant.search.sensitivity import Replay, Swapper

EDGES = (0.0, 0.5, 1.0)
TIMESTEPS = (900, 600, 300, 100)


@pytest.fixture
def base(denoiser: nn.Module) -> QuantPlan:
    weight, activation = QuantSpec(8, granularity="channel"), QuantSpec(8, granularity="token", dynamic=True)
    names = [name for name in linear_names(denoiser) if name.startswith("blocks")]
    return Recipe(weight, activation, SmoothSpec(0.5, per_segment=True), segments=EDGES).resolve(names)


@pytest.fixture
def group() -> Group:
    return Group("blocks.0", "mlp", ("blocks.0.fc1", "blocks.0.fc2"), 768, 40)


def sampled(denoiser: nn.Module, timesteps: tuple[int, ...] = TIMESTEPS) -> Tensor:
    """A loop whose next input depends on every output before."""
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(7))
    for t in timesteps:
        x = x + 0.1 * denoiser(x, timestep=torch.full((2,), t))[..., :8]
    return x


def test_swapped_is_what_quantizing_gives_and_leaves_no_trace(
    denoiser: nn.Module, make_denoiser: Callable, base: QuantPlan, group: Group, calibrated: Callable
) -> None:
    stats, before = calibrated(denoiser, [1], [100, 900]), sampled(denoiser)
    linears = {name: denoiser.get_submodule(name) for name in linear_names(denoiser)}
    plan = candidate_plan(base, group, Candidate("blocks.0/mlp", 1, "weight", 4))
    other = make_denoiser()
    other.load_state_dict(denoiser.state_dict())
    quantize_denoiser(other, plan, stats)
    swapper = Swapper(denoiser, EDGES, stats)
    with swapper.swapped(plan):
        assert torch.equal(sampled(denoiser), sampled(other))
        assert not torch.equal(sampled(denoiser), before)
    assert torch.equal(sampled(denoiser), before)
    assert all(denoiser.get_submodule(name) is linear for name, linear in linears.items())
    with pytest.raises(RuntimeError), swapper.swapped(plan):
        raise RuntimeError
    assert all(denoiser.get_submodule(name) is linear for name, linear in linears.items())
    swapper.close()
    assert not denoiser._forward_pre_hooks and not denoiser._forward_hooks


def test_a_shared_linear_is_swapped_everywhere(denoiser: nn.Module, base: QuantPlan, group: Group) -> None:
    denoiser.blocks[1]["fc1"] = denoiser.blocks[0]["fc1"]  # type: ignore[index, operator]
    plain = Recipe(QuantSpec(4, granularity="channel"), segments=EDGES).resolve(["blocks.0.fc1"])
    with Swapper(denoiser, EDGES, None).swapped(plain):
        assert denoiser.blocks[1]["fc1"] is denoiser.blocks[0]["fc1"]  # type: ignore[index, operator]
    assert isinstance(denoiser.blocks[1]["fc1"], nn.Linear)  # type: ignore[index, operator]


@pytest.mark.parametrize(("segment", "computed"), [(1, 4), (0, 2)])
def test_replay_computes_only_from_the_candidates_segment_on(
    segment: int, computed: int, denoiser: nn.Module, base: QuantPlan, group: Group, calibrated: Callable
) -> None:
    stats = calibrated(denoiser, [1], [100, 900])
    swapper = Swapper(denoiser, EDGES, stats)
    replay = Replay(denoiser, swapper.context)
    plan = candidate_plan(base, group, Candidate("blocks.0/mlp", segment, "activation", 3))
    with swapper.swapped(plan):
        wanted = sampled(denoiser)
    with replay.recording():
        exact = sampled(denoiser)
    calls: list[int] = []
    denoiser.proj_in.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    with swapper.swapped(plan), replay.skipping(EDGES[segment + 1]):
        assert torch.equal(sampled(denoiser), wanted) and not torch.equal(wanted, exact)
    assert len(calls) == computed
    calls.clear()
    with swapper.swapped(plan), replay.skipping(0.5):  # other steps were not recorded: computed, not guessed
        sampled(denoiser, (950, 650))
    assert len(calls) == 2
    assert torch.equal(sampled(denoiser), exact)


def test_replay_tells_guidance_branches_and_lists_apart() -> None:
    """Same latents with another prompt, as pipelines call that guide in two calls; and latents in lists."""

    class Guided(nn.Module):
        def forward(self, latents: list[Tensor], timestep: Tensor, text: dict[str, Tensor]) -> Tensor:
            return latents[0] * text["prompt"].sum() + timestep

    denoiser = Guided()
    context = StepContext((0, 0.5, 1))
    replay = Replay(denoiser, context)
    latents, texts = [torch.randn(1, 3)], [torch.ones(2), -torch.ones(2) * 3]

    def both() -> list[Tensor]:
        return [denoiser(latents, torch.tensor([900]), {"prompt": text}) for text in texts]

    attachment = context.attach(denoiser)
    with replay.recording():
        exact = both()
    with replay.skipping(0.5):
        assert all(map(torch.equal, both(), exact))
    attachment.remove()


def test_errors_on_calibration_rows(denoiser: nn.Module, group: Group, calibrated: Callable) -> None:
    spec = QuantSpec(8, granularity="channel")
    base = Recipe(spec, segments=EDGES).resolve(["blocks.0.fc1", "blocks.0.fc2"])
    stats = calibrated(denoiser, [1, 2], [100, 900])
    candidates = [Candidate(group.name, s, "weight", b) for s in (0, 1) for b in (4, 8)]
    found = errors_on_rows(denoiser, base, stats, {group.name: group}, candidates)
    for candidate in candidates:
        wanted = 0.0
        for name in group.layers:
            weight = denoiser.get_submodule(name).weight.detach()  # type: ignore[union-attr]
            lo, hi = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
            scale = (hi - lo) / (2**candidate.bits - 1)
            zero = (-lo / scale).round()
            rounded = (((weight / scale).round() + zero).clamp(0, 2**candidate.bits - 1) - zero) * scale
            rows = stats.segment(name, EDGES[candidate.segment], EDGES[candidate.segment + 1]).rows
            wanted += float((rows @ (rounded - weight).T).square().sum() / (rows @ weight.T).square().sum())
        assert found[candidate] == pytest.approx(wanted, rel=1e-4)
    assert 100 < found[candidates[0]] / found[candidates[1]] < 1000  # 4 bits: 2^8 times the variance


def test_one_step_is_the_error_of_the_denoisers_output(
    denoiser: nn.Module, base: QuantPlan, group: Group, calibrated: Callable
) -> None:
    stats = calibrated(denoiser, [1, 2], [100, 900])
    swapper = Swapper(denoiser, EDGES, stats)
    one_step = OneStep(swapper)
    inputs: list[Tensor] = []
    handle = denoiser.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    with one_step.recording():
        sampled(denoiser)  # steps 900 and 600, then 300 and 100: the middle ones are 600 and 100
    handle.remove()
    candidates = [Candidate(group.name, s, "weight", b) for s in (0, 1) for b in (4, 8)]
    for candidate, x, level in zip(candidates[::2], (inputs[3], inputs[1]), (100, 600), strict=True):
        plan, t = candidate_plan(base, group, candidate), torch.full((2,), level)
        exact = denoiser(x, t)
        with swapper.swapped(plan):
            error = denoiser(x, t) - exact
        wanted = float((error.square().sum() / exact.square().sum()).detach())
        assert one_step.error(plan, candidate.segment) == pytest.approx(wanted, rel=1e-4)
    found = proxy_errors(denoiser, base, stats, {group.name: group}, candidates, one_step).proxies(candidates)
    on_rows = errors_on_rows(denoiser, base, stats, {group.name: group}, candidates)
    for narrow, wide in ((0, 1), (2, 3)):
        ratio = on_rows[candidates[wide]] / on_rows[candidates[narrow]]
        assert found[candidates[wide]] == pytest.approx(found[candidates[narrow]] * ratio)


def test_the_middle_step_of_prompts_that_are_sampled_one_after_another(
    denoiser: nn.Module, base: QuantPlan, group: Group, calibrated: Callable
) -> None:
    swapper = Swapper(denoiser, EDGES, calibrated(denoiser, [1, 2], [100, 900]))
    one_step, inputs = OneStep(swapper), torch.randn(2, 1, 5, 8)
    with one_step.recording():
        for x in inputs:
            for level in (900, 700, 600):
                denoiser(x, torch.full((1,), level))
    plan, t = candidate_plan(base, group, Candidate(group.name, 1, "weight", 4)), torch.full((1,), 700)
    exact = [denoiser(x, t) for x in inputs]
    with swapper.swapped(plan):
        errors = [denoiser(x, t) - of for x, of in zip(inputs, exact, strict=True)]
    wanted = [float((e.square().sum() / of.square().sum()).detach()) for e, of in zip(errors, exact, strict=True)]
    assert one_step.error(plan, 1) in [pytest.approx(w, rel=1e-4) for w in wanted]


def test_groups_and_candidates() -> None:
    layers = ["b.0.attn.q", "b.0.attn.k", "b.0.ff", "b.1.attn.q", "out"]
    roles = dict(zip(layers, ["attention", "attention", "mlp", "attention", "mlp"], strict=True))
    groups = groups_of(layers, roles, dict.fromkeys(layers, 6), dict.fromkeys(layers, 2))
    assert [g.name for g in groups] == ["b.0/attention", "b.0/mlp", "b.1/attention", "out/mlp"]
    assert groups[0].layers == ("b.0.attn.q", "b.0.attn.k") and groups[0].weights_numel == 12
    found = candidates_of([(g, s) for g in groups for s in range(3)], {"weight": (4, 16), "activation": (4, 8)})
    assert len(found) == 4 * 3 * (1 + 2) and all(c.bits != 16 for c in found)
    assert len({c.name for c in found}) == len(found) and not any("/" in c.name for c in found)
    assert block_of("temporal_transformer_blocks.3.ff.net.0.proj") == "temporal_transformer_blocks.3"


@pytest.mark.parametrize("choices", [[], "48", 4, [4, 4], [1, 8], [9], [True]])
def test_impossible_choices_are_refused(choices: object) -> None:
    with pytest.raises(UserError, match="bit-widths from 2 to 8, or 16"):
        check_choices(choices, "x")  # type: ignore[arg-type]
    assert check_choices([8, 16, 4], "x") == (4, 8, 16)


def test_step_shares_count_what_calibration_saw(denoiser: nn.Module, calibrated: Callable) -> None:
    stats = calibrated(denoiser, [1, 2], [999, 950, 900, 300])
    cuts = [(0, 0.5, 1), (0, 0.5, 0.95, 1), (0, 0.275, 1), (0, 0.92, 1)]
    shares = {edges: step_shares(stats, edges) for edges in cuts}
    assert all(list(found) == linear_names(denoiser) for found in shares.values())
    assert set(shares[0, 0.5, 1].values()) == {(0.25, 0.75)}
    assert shares[0, 0.5, 0.95, 1]["time"] == pytest.approx((0.25, 0.5, 0.25))
    assert shares[0, 0.275, 1]["time"] == (0, 1)  # cuts the bucket 0.25 to 0.3, whose step lies above
    assert shares[0, 0.92, 1]["time"] == (0.5, 0.5)
