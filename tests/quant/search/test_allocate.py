"""Budgets, the two steps of ViDiT-Q, and bytes against those of a real artifact."""

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from viditq.errors import UserError
from viditq.quant import QuantPlan, Recipe, linear_names, quantize_denoiser
from viditq.quant.artifact import load_denoiser
from viditq.quant.artifact_writer import save_denoiser
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.methods.transforms import SmoothSpec
from viditq.quant.search.allocate import Assignment, Search, allocate, allocate_by_role, cost_of, extremes, used
from viditq.quant.search.budget import Budget
from viditq.quant.search.candidates import Candidate, assembled, candidates_of, groups_of
from viditq.quant.search.policy import found_plan

CHOICES = {"weight": (4, 8), "activation": (6, 8)}
ROLES = {"fc1": "first", "fc2": "second", "proj_in": "first", "time": "first"}
SHARES = (0.75, 0.25)
Shapes = dict[str, tuple[int, int]]


def searching(
    denoiser: nn.Module, names: list[str], smoothing: SmoothSpec | None = None, low_rank: int | None = None
) -> Search:
    linears = {n: m for n, m in denoiser.named_modules() if isinstance(m, nn.Linear)}
    shapes = {n: (m.out_features, m.in_features) for n, m in linears.items()}
    weight, activation = QuantSpec(8, granularity="channel"), QuantSpec(8, granularity="token", dynamic=True)
    base = Recipe(weight, activation, smoothing, segments=(0, 0.5, 1), low_rank=low_rank).resolve(names)
    roles = {n: ROLES[n.rsplit(".")[-1]] for n in names}
    numel, inputs = {n: m.weight.numel() for n, m in linears.items()}, {n: m.in_features for n, m in linears.items()}
    return Search(base, groups_of(names, roles, numel, inputs), CHOICES, shapes, dict.fromkeys(names, SHARES))


def random_costs(search: Search, seed: int) -> dict[Candidate, float]:
    draw = random.Random(seed)
    candidates = candidates_of(search.cells, search.choices)
    return {c: draw.uniform(0.5, 2.0) * 4.0**-c.bits for c in candidates}


BLOCK_0 = ["blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1"]


@pytest.mark.parametrize("budget", [Budget(5, 7), Budget(6.5), Budget(None, 6.5), Budget(size_bytes=900)])
@pytest.mark.parametrize("seed", range(3))
def test_exact_against_every_assignment(denoiser: nn.Module, budget: Budget, seed: int) -> None:
    search = searching(denoiser, BLOCK_0[:2])
    costs = random_costs(search, seed)

    def fits(assignment: Assignment) -> bool:
        uses = used(search, assignment, budget)
        limits = {**budget.limits, "size_bytes": budget.size_bytes or 1e9}
        return all(uses[name] <= limit + 1e-9 for name, limit in limits.items())

    cells = [(g.name, s) for g, s in search.cells]
    every = (dict(zip(cells, bits, strict=True)) for bits in itertools.product(search.bits(), repeat=len(cells)))
    best = min(cost_of(search, costs, a) for a in every if fits(a))
    exact, greedy = (allocate(search, costs, budget, solver) for solver in ("exact", "greedy"))
    assert fits(exact) and fits(greedy)
    assert cost_of(search, costs, exact) == pytest.approx(best, rel=1e-6)
    assert cost_of(search, costs, greedy) >= best - 1e-12


def test_denoisers_left_in_float_count_in_bytes(denoiser: nn.Module) -> None:
    """They take room of the budget, and change nothing about how the rest is shared out."""
    alone = searching(denoiser, BLOCK_0[:2])
    beside = replace(alone, float_bytes=5000)
    costs = random_costs(alone, 0)
    assignment = allocate(beside, costs, Budget(size_bytes=5900))
    assert assignment == allocate(alone, costs, Budget(size_bytes=900))
    uses = used(alone, assignment, Budget(8))
    assert used(beside, assignment, Budget(8)) == {**uses, "size_bytes": uses["size_bytes"] + 5000}
    ends, shifted = (extremes(search, Budget(8))["size_bytes"] for search in (alone, beside))
    assert shifted == (ends[0] + 5000, ends[1] + 5000)
    with pytest.raises(UserError, match=f"the least that the choices allow is {shifted[0]:.0f}"):
        allocate(beside, costs, Budget(size_bytes=5000))


def test_averages_are_those_of_the_plan(denoiser: nn.Module) -> None:
    search = searching(denoiser, linear_names(denoiser))
    budget = Budget(5.5, 7.2)
    assignment = allocate(search, random_costs(search, 0), budget)
    plan, uses = assembled(search.base, search.groups, assignment), used(search, assignment, budget)
    numel = {n: r * c for n, (r, c) in search.shapes.items()}
    inputs = {n: c for n, (_, c) in search.shapes.items()}
    assert plan.average_weight_bits(numel, shares=SHARES) == pytest.approx(uses["weight_bits"])
    assert plan.average_activation_bits(inputs, SHARES) == pytest.approx(uses["activation_bits"])
    assert uses["weight_bits"] <= 5.5 + 1e-9 and uses["activation_bits"] <= 7.2 + 1e-9
    assert plan.bits_vary and not search.base.bits_vary


def test_low_rank_branches_count_in_the_averages(denoiser: nn.Module) -> None:
    search = searching(denoiser, BLOCK_0, low_rank=2)
    assignment = allocate(search, random_costs(search, 0), Budget(9.5))
    plan, uses = assembled(search.base, search.groups, assignment), used(search, assignment, Budget(9.5))
    numel, inputs = (
        {n: search.shapes[n][0] * search.shapes[n][1] for n in BLOCK_0},
        {n: search.shapes[n][1] for n in BLOCK_0},
    )
    assert plan.average_weight_bits(numel, inputs, SHARES) == pytest.approx(uses["weight_bits"])
    assert 4 + 16 * 2 * 40 / 384 < uses["weight_bits"] <= 9.5 + 1e-9  # every weight here is 16 x 24
    with pytest.raises(UserError, match=r"weight_bits=5 is not possible: the least that the choices allow is 7\.33"):
        allocate(search, random_costs(search, 0), Budget(5))


@pytest.mark.parametrize(
    ("smoothing", "low_rank"),
    [(None, None), (SmoothSpec(0.5), None), (SmoothSpec(0.5, per_segment=True), None), (None, 3)],
)
def test_bytes_are_those_of_the_artifact(
    smoothing: SmoothSpec | None, low_rank: int | None, denoiser: nn.Module, calibrated: Callable, tmp_path: Path
) -> None:
    """Segments with equal weights store them once, also where their activations differ; W8 and W4 store both."""
    search = searching(denoiser, BLOCK_0, smoothing, low_rank)
    stats = calibrated(denoiser, [1, 2], [100, 900])
    bits = {(g.name, s): (4, 8) for g, s in search.cells}
    bits |= {(search.groups[0].name, 1): (8, 8), (search.groups[1].name, 0): (4, 6)}
    plan = assembled(search.base, search.groups, bits)
    quantize_denoiser(denoiser, plan, stats)
    save_denoiser(tmp_path / "artifact", denoiser, plan, {})
    tensors = load_file(tmp_path / "artifact" / "model.safetensors")
    fields = ("qweight", "weight_scale", "weight_zero_point", "low_rank_up", "low_rank_down")
    stored = {name: t for name, t in tensors.items() if name.endswith(fields)}
    size = sum(t.numel() * (4 if name.endswith("weight_scale") else t.element_size()) for name, t in stored.items())
    assert ("low_rank_up" in " ".join(stored)) == (low_rank is not None)
    assert size == used(search, bits, Budget(8))["size_bytes"]
    x = torch.randn(2, 5, 8)
    again, *_ = load_denoiser(tmp_path / "artifact", type(denoiser))
    for timestep in (100, 900):
        t = torch.full((2,), timestep)
        assert torch.equal(again(x, t), denoiser(x, t))


def test_a_segment_left_in_float_stores_the_float_weight(denoiser: nn.Module, tmp_path: Path) -> None:
    search = searching(denoiser, BLOCK_0)
    before = {n: denoiser.get_submodule(n).weight.clone() for n in BLOCK_0}
    x = torch.randn(2, 5, 8)
    exact = denoiser(x, torch.full((2,), 900))
    plan = assembled(search.base, search.groups, {(g.name, 0): (4, 8) for g in search.groups})
    assert plan.layers["blocks.0.fc1"] == ("w4a8", None)
    quantize_denoiser(denoiser, plan, None)
    save_denoiser(tmp_path / "artifact", denoiser, plan, {})
    tensors = load_file(tmp_path / "artifact" / "model.safetensors")
    assert torch.equal(tensors["blocks.0.fc1.variants.1.weight"].float(), before["blocks.0.fc1"])
    assert torch.allclose(denoiser(x, torch.full((2,), 900)), exact, atol=1e-6)
    assert not torch.allclose(denoiser(x, torch.full((2,), 100)), exact, atol=1e-3)
    numel = {n: w.numel() for n, w in before.items()}
    assert plan.average_weight_bits(numel, shares=SHARES) == pytest.approx(0.75 * 4 + 0.25 * 16)


def test_output_error_shares_the_budget_between_metrics_and_metrics_inside(denoiser: nn.Module) -> None:
    search = searching(denoiser, linear_names(denoiser))
    output, metric, budget = random_costs(search, 1), random_costs(search, 2), Budget(5.5)
    roles = {"first": "ssim", "second": "clipsim"}
    by_output = allocate(search, output, budget)
    two_step = allocate_by_role(search, output, metric, roles, budget)
    for role in roles:
        part = replace(search, groups=[g for g in search.groups if g.role == role])
        names = {g.name for g in part.groups}
        old, new = ({k: v for k, v in a.items() if k[0] in names} for a in (by_output, two_step))
        given = used(part, old, budget)["weight_bits"]
        assert used(part, new, budget)["weight_bits"] <= given + 1e-9
        assert cost_of(part, metric, new) <= cost_of(part, metric, old) + 1e-12
        assert new == allocate(part, metric, Budget(given))
    assert allocate_by_role(search, output, output, roles, budget) == by_output


def test_latency_takes_pairs_of_bits(denoiser: nn.Module) -> None:
    """As on a GPU without a fast W4A8 kernel: w4a8 costs more time than w8a8, so that only quality can want it."""
    search = searching(denoiser, BLOCK_0)
    table = {"w8a8": 0.6, "w4a8": 0.7, "w8a6": 0.5, "w4a6": 0.5}
    costs = random_costs(search, 0)
    fast = allocate(search, costs, Budget(latency=0.6, latency_costs=table))
    assert set(fast.values()) == {(8, 8)}
    assert set(allocate(search, costs, Budget(latency=0.5, latency_costs=table)).values()) == {(8, 6)}
    with pytest.raises(UserError, match="latency_costs has no w4a6"):
        allocate(search, costs, Budget(latency=0.6, latency_costs={"w8a8": 0.6, "w4a8": 0.7, "w8a6": 1.0}))


def test_budgets_are_checked(denoiser: nn.Module) -> None:
    for fields, words in [
        ({}, "has no budget"),
        ({"weight_bits": -1}, "above 0"),
        ({"weight_bits": "5"}, "above 0"),
        ({"latency": 0.5}, "needs latency_costs"),
        ({"latency": 0.5, "latency_costs": {"int8": 0.5}}, "'int8', which is no scheme such as w4a8"),
        ({"latency": 0.5, "latency_costs": {"w4a8": 0}}, "w4a8: 0; give a number above 0"),
    ]:
        with pytest.raises(UserError, match=words):
            Budget(**fields)
    search = searching(denoiser, BLOCK_0)
    with pytest.raises(UserError, match="weight_bits=3 is not possible"):
        allocate(search, random_costs(search, 0), Budget(3))
    with pytest.raises(UserError, match="was not measured"):
        allocate(search, {}, Budget(5))


def test_the_uniform_assignment_is_the_uniform_plan(denoiser: nn.Module) -> None:
    search = searching(denoiser, linear_names(denoiser))
    plan = assembled(search.base, search.groups, {(g.name, s): (8, 8) for g, s in search.cells})
    assert plan == QuantPlan(search.base.edges, search.base.schemes, search.base.layers)


def test_what_can_be_used_at_least_and_at_most(denoiser: nn.Module) -> None:
    search = searching(denoiser, BLOCK_0)
    table = {"w8a8": 0.6, "w4a8": 0.7, "w8a6": 0.5, "w4a6": 0.55}
    ends = extremes(search, Budget(latency=0.6, latency_costs=table))
    for bits, end in ((4, 0), (8, 1)):
        uses = used(search, {(g.name, s): (bits, 8) for g, s in search.cells}, Budget(8))
        assert ends["weight_bits"][end] == pytest.approx(bits)
        assert ends["size_bytes"][end] == uses["size_bytes"]
    assert ends["activation_bits"] == pytest.approx((6, 8)) and ends["latency"] == pytest.approx((0.5, 0.7))


def test_parts_that_never_run_cost_nothing_and_keep_the_nearest_bits(denoiser: nn.Module) -> None:
    """As of one of two denoisers: `blocks.1` runs in the second segment only, `blocks.0` in both."""
    search = searching(denoiser, BLOCK_0)
    search = replace(search, shares={**search.shares, "blocks.1.fc1": (0.0, 1.0)})
    assert [(g.block, s) for g, s in search.cells] == [
        *itertools.product(["blocks.0"], (0, 1)),
        *itertools.product(["blocks.0"], (0, 1)),
        ("blocks.1", 1),
    ]
    candidates = candidates_of(search.cells, search.choices)
    assert not any(c.group.startswith("blocks.1") and c.segment == 0 for c in candidates)
    assignment = {(g.name, s): (8 if g.block == "blocks.1" else 4, 8) for g, s in search.cells}
    plan = found_plan(search, assignment)
    assert plan.layers["blocks.1.fc1"] == ("w8a8", "w8a8") and plan.layers["blocks.0.fc1"] == ("w4a8", "w4a8")
    numel = {n: search.shapes[n][0] * search.shapes[n][1] for n in BLOCK_0}
    uses = used(search, assignment, Budget(8))
    assert uses["weight_bits"] == pytest.approx((4 + 4 + 8) / 3)
    assert plan.average_weight_bits(numel, shares=search.shares) == pytest.approx(uses["weight_bits"])
    allocated = allocate(search, random_costs(search, 0), Budget(5.5))
    assert ("blocks.1/first", 0) not in allocated
