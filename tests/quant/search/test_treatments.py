"""What can be done to a part, what is worth trying, what it takes, and what it does."""

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from viditq.errors import UserError
from viditq.quant import QuantPlan, Recipe, quantize_denoiser
from viditq.quant.artifact import load_denoiser
from viditq.quant.artifact_writer import save_denoiser
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.search.allotment import TENSOR_BYTES, Part, allotted, anchor_of, cost_of, evenly, treated_plan, used
from viditq.quant.search.candidates import groups_of
from viditq.quant.search.part_errors import PartErrors, between_widths, explored
from viditq.quant.search.sensitivity import Swapper
from viditq.quant.search.some_steps import SomeSteps
from viditq.quant.search.treatment_policy import SizedBudget, TreatmentSearch
from viditq.quant.search.treatments import TRANSFORMS, Menu, Treatment

EDGES = (0.0, 0.5, 1.0)
MENU = Menu((*TRANSFORMS,), (3, 4, 8), (4, 8), (0, 8), ("nearest", "gptq"), ("min_max", "lp"), (0, 2))
ROLES = {"blocks.0.fc1": "first", "blocks.0.fc2": "second", "blocks.1.fc1": "first"}
SETTINGS: dict[str, Any] = {
    **{"budget": {"size": 0.5}, "symmetric": False, "transforms": ["none", "rotate"], "weight_choices": [4, 8]},
    **{"activation_choices": [8], "groups": [0, 8], "roundings": ["nearest"], "ranges": ["min_max"], "low_ranks": [0]},
    **{"held_out": 2, "num_steps": 2, "step_prompts": 2},
}


def parts_of(denoiser: nn.Module, menu: Menu = MENU, symmetric: bool = False) -> list[Part]:
    linears = {name: denoiser.get_submodule(name) for name in ROLES}
    shapes = {name: tuple(m.weight.shape) for name, m in linears.items()}
    numel = {name: rows * columns for name, (rows, columns) in shapes.items()}
    groups = groups_of([*ROLES], ROLES, numel, {name: columns for name, (_, columns) in shapes.items()})
    return [
        Part(g, tuple(shapes[layer] for layer in g.layers), menu.possible([shapes[n] for n in g.layers]), 2, symmetric)
        for g in groups
    ]


def every(menu: Menu) -> list[Treatment]:
    how = itertools.product(menu.roundings, menu.ranges, menu.low_ranks)
    numbers = itertools.product(menu.transforms, menu.weight_choices, menu.activation_choices, menu.groups)
    return [Treatment(*a, *b) for a, b in itertools.product(numbers, how)]


def test_each_treatment_is_a_scheme_of_its_own_that_a_plan_keeps() -> None:
    treatments = every(MENU)
    schemes = {t.name: t.scheme(False) for t in treatments}
    assert len(schemes) == len(treatments) == len({json.dumps(s.to_dict()) for s in schemes.values()})
    plan = QuantPlan(EDGES, schemes, {"layer": ("w4a8", "w3a4_group8_timestep_aware_lp_gptq_rank2")})
    assert QuantPlan.from_json(plan.to_json()) == plan
    for scheme in (t.scheme(True) for t in treatments):
        assert scheme.weight and scheme.activation and scheme.weight.symmetric and scheme.activation.symmetric


def test_what_is_impossible_for_a_width_is_left_out() -> None:
    menu = Menu(("none", "convrot"), (4,), (8,), (0, 64, 48), ("gptq",), ("min_max",), (0, 32))
    assert menu.possible([(64, 96)]) == replace(menu, groups=(0, 48))
    assert menu.possible([(32, 96), (96, 40)]) == replace(menu, groups=(0,), transforms=("none",), low_ranks=(0,))
    with pytest.raises(UserError, match=r"groups=\[64\]: nothing of it is possible for Linears of 96 inputs"):
        replace(menu, groups=(64,)).possible([(64, 96)])


def test_exploring_ends_at_the_best_of_what_compounds() -> None:
    """Where choices do not depend on each other, one after the other finds what the whole product would."""
    factors = {"none": 1.0, "static": 0.9, "timestep_aware": 0.6, "rotate": 0.7, "convrot": 0.8, "scale_rotate": 0.95}
    asked: list[Treatment] = []

    def error(t: Treatment) -> float:
        asked.append(t)
        small = factors[t.transform] * (0.5 if t.rounding == "gptq" else 1.0) * (0.9 if t.ranges == "lp" else 1.0)
        return small * (0.8 if t.group else 1.0) * 4.0**-t.weight_bits * (0.5 if t.low_rank else 1.0)

    for rank_bytes, ranks in ((10.0, {0, 2}), (1e6, {0})):  # a branch that costs more than a bit is not tried further

        def nbytes(t: Treatment, rank_bytes: float = rank_bytes) -> float:
            return 100.0 * t.weight_bits + bool(t.low_rank) * rank_bytes

        asked.clear()
        known = explored(MENU, error, nbytes)
        assert len(asked) == len({*asked}) == len(known) < 0.2 * len(every(MENU))
        assert min(known.values()) == pytest.approx(min(error(t) for t in every(MENU) if t.low_rank in ranks))
        widest = [t for t in known if t.weight_bits == 8]
        assert {t.low_rank for t in widest} == ranks
        # the best, the best that is stored once, and the first that does not rotate and comes near the best of those
        assert {t.transform for t in widest} == {"timestep_aware", "rotate", "none"}
        assert anchor_of(known).weight_bits == 4 and not anchor_of(known).low_rank


@pytest.mark.parametrize(("gain", "taken"), [(0.9, {"none"}), (0.7, {"none", "rotate"})])
def test_a_rotation_has_to_be_worth_its_time(gain: float, taken: set[str]) -> None:
    menu = replace(MENU, transforms=("none", "rotate"), low_ranks=(0,))
    known = explored(menu, lambda t: (gain if t.transform == "rotate" else 1.0) * 4.0**-t.weight_bits, lambda t: 1.0)
    assert {t.transform for t in known if t.weight_bits == 8} == taken


@pytest.mark.parametrize("widths", [(2, 3, 4, 5, 6, 8), (3, 5, 6, 7), (2, 3, 4, 5)])
def test_of_many_widths_two_are_fitted_and_the_others_follow(widths: tuple[int, ...]) -> None:
    """Exactly, where the error is what activations leave and a part that goes with the square of the step."""
    asked: list[Treatment] = []

    def exact(t: Treatment) -> float:
        weights = (0.5 if t.group else 1.0) * (0.3 if t.low_rank else 1.0) / (2**t.weight_bits - 1) ** 2
        return weights + 4.0**-t.activation_bits

    def error(t: Treatment) -> float:
        asked.append(t)
        return exact(t)

    menu = replace(MENU, weight_choices=widths, transforms=("none", "static"))
    known = explored(menu, error, lambda t: float(t.weight_bits + t.low_rank / 100))
    middle = next(bits for bits in widths if bits >= 4)
    assert {t.weight_bits for t in asked} == {middle, widths[-1]}
    assert {t.weight_bits for t in known if t.group} == {t.weight_bits for t in known if t.low_rank} == {*widths}
    for treatment, value in known.items():
        assert value == pytest.approx(exact(treatment), rel=1e-6)


def test_an_error_that_more_bits_do_not_lessen_stays_what_it_is_at_the_widest() -> None:
    for bits in (2, 5):
        assert between_widths({4: 0.9e-3, 8: 1e-3}, bits) == pytest.approx(1e-3)


def test_a_limit_of_time_counts_rotations(denoiser: nn.Module) -> None:
    menu = Menu(("none", "rotate"), (4,), (8,), (0,), ("nearest",), ("min_max",), (0,))
    parts = parts_of(denoiser, menu)
    costs = {p.name: {t: 1.0 if t.rotates else 2.0 for t in every(menu)} for p in parts}
    whole = sum(p.group.weights_numel for p in parts)
    first = parts[0].group.weights_numel / whole
    for latency, rotated in ((0.5, 0), (0.5 + 0.2 * first + 1e-9, 1), (0.7, 3)):
        budget = SizedBudget(latency=latency, latency_costs={"w4a8": 0.5, "rotate": 0.2})
        found = allotted(parts, costs, budget, None)
        assert sum(t.rotates for t in found.values()) == rotated
        assert used(parts, found, budget)["latency"] <= latency + 1e-9


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "budget",
    [SizedBudget(size=3900), SizedBudget(weight_bits=5, activation_bits=7), SizedBudget(size=4600, weight_bits=5)],
)
def test_allotted_against_every_choice(denoiser: nn.Module, budget: SizedBudget, seed: int) -> None:
    draw = random.Random(seed)
    few = Menu(("none", "timestep_aware"), (3, 8), (6,), (0,), ("nearest",), ("min_max",), (0, 2))
    parts = parts_of(denoiser, few)
    costs = {p.name: {t: draw.uniform(0.5, 2) * 4.0**-t.weight_bits for t in every(few)} for p in parts}
    room = budget.size

    def fits(treated: dict[str, Treatment]) -> bool:
        uses = used(parts, treated, budget)
        limits = {**budget.given, "size": room or 1e9}
        return all(uses[name] <= limit * (1 + 1e-9) for name, limit in limits.items())

    choices = [dict(zip([p.name for p in parts], of, strict=True)) for of in itertools.product(every(few), repeat=3)]
    possible = [choice for choice in choices if fits(choice)]
    best = allotted(parts, costs, budget, room)
    assert fits(best) and cost_of(costs, best) == pytest.approx(min(cost_of(costs, c) for c in possible))
    kinds = [c for c in possible if len({(t.weight_bits, t.activation_bits, t.low_rank) for t in c.values()}) == 1]
    alike = evenly(parts, costs, budget, room)
    assert (alike is None) == (not kinds)
    assert alike is None or cost_of(costs, alike) == pytest.approx(min(cost_of(costs, c) for c in kinds))


def test_bytes_and_bits_are_those_of_the_artifact(denoiser: nn.Module, calibrated: Callable, tmp_path: Path) -> None:
    stats = calibrated(denoiser, [1, 2], [100, 900])
    parts = parts_of(denoiser)
    chosen = [
        Treatment("timestep_aware", 3, 8, 8, "gptq", "min_max", 0),
        Treatment("scale_rotate", 4, 4, 0, "nearest", "lp", 2),
        Treatment("none", 8, 8, 0, "gptq", "min_max", 0),
    ]
    treated = dict(zip([p.name for p in parts], chosen, strict=True))
    plan = treated_plan(EDGES, parts, treated)
    quantize_denoiser(denoiser, plan, stats)
    save_denoiser(tmp_path / "artifact", denoiser, plan, {})
    stored = load_file(tmp_path / "artifact" / "model.safetensors")
    own = {name: t for name, t in stored.items() if ".variants." in name}
    bytes_of_tensors = sum(t.numel() * t.element_size() for t in own.values())
    predicted = sum(part.stored_bytes(treated[part.name]) for part in parts)
    branch = sum(t.numel() * (t.element_size() - 2) for name, t in own.items() if "low_rank" in name)
    assert predicted - TENSOR_BYTES * len(own) == bytes_of_tensors - branch
    numel = {n: denoiser.get_submodule(n).out_features * denoiser.get_submodule(n).in_features for n in ROLES}
    inputs = {n: denoiser.get_submodule(n).in_features for n in ROLES}
    uses = used(parts, treated, SizedBudget(size=1.0))
    assert plan.average_weight_bits(numel, inputs) == pytest.approx(uses["weight_bits"])
    assert plan.average_activation_bits(inputs) == pytest.approx(uses["activation_bits"])
    again, *_ = load_denoiser(tmp_path / "artifact", type(denoiser))
    x, t = torch.randn(2, 5, 8), torch.full((2,), 900)
    assert torch.equal(again(x, t), denoiser(x, t))


def test_errors_are_those_of_the_inputs_that_were_recorded(denoiser: nn.Module, calibrated: Callable) -> None:
    """Not of calibration's: a rounding that learns fits those. An error of its own formula, for comparison."""
    swapper = Swapper(denoiser, (0.0, 1.0), stats := calibrated(denoiser, [1], [900]))
    steps = SomeSteps(swapper, 1, ["blocks.0.fc1"])
    linear: Any = denoiser.get_submodule("blocks.0.fc1")
    inputs: list[torch.Tensor] = []
    hook = linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0].clone()))
    with steps.recording(), torch.no_grad():
        denoiser(torch.randn(1, 5, 8), torch.full((1,), 900))
    hook.remove()
    rows_nC = steps.rows("blocks.0.fc1")[0]
    assert torch.equal(rows_nC.sort(0).values, inputs[0].sort(0).values) and not linear._forward_pre_hooks
    weight_only = Treatment("none", 3, 16, 0, "nearest", "min_max", 0)
    error = PartErrors(denoiser, {"blocks.0.fc1": steps.rows("blocks.0.fc1")}, (0.0, 1.0), stats, False)
    low, high = linear.weight.detach().aminmax(dim=1, keepdim=True)
    scale = (high.clamp(min=0) - low.clamp(max=0)) / 7
    zero = (-low.clamp(max=0) / scale).round()
    rounded = (((linear.weight.detach() / scale).round() + zero).clamp(0, 7) - zero) * scale
    wrong = rows_nC @ (rounded - linear.weight.detach()).T
    wanted = float(wrong.square().sum() / (rows_nC @ linear.weight.detach().T).square().sum())
    assert error.error(weight_only) == pytest.approx(wanted, rel=1e-3)


def test_steps_of_every_segment_are_taken_and_their_errors_add_up(denoiser: nn.Module, calibrated: Callable) -> None:
    stats = calibrated(denoiser, [1, 2], [100, 900])
    swapper = Swapper(denoiser, EDGES, stats)
    steps = SomeSteps(swapper, 2, [*ROLES])
    with steps.recording(), torch.no_grad():
        for timestep in (900, 800, 700, 100):
            denoiser(torch.randn(2, 5, 8), torch.full((2,), timestep))
    rows = steps.rows("blocks.0.fc2")
    assert {segment: tuple(x.shape) for segment, x in rows.items()} == {0: (10, 24), 1: (10, 24)}
    part = parts_of(denoiser)[0]
    errors = PartErrors(denoiser, {n: steps.rows(n) for n in part.group.layers}, EDGES, stats, False)
    coarse, fine = (Treatment("timestep_aware", bits, 8, 0, "nearest", "min_max", 0) for bits in (3, 8))
    assert errors.error(coarse) > 50 * errors.error(fine) > 0
    outputs = [steps.error(treated_plan(EDGES, [part], {part.name: t})) for t in (coarse, fine)]
    assert outputs[0] > 50 * outputs[1] > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"transforms": ["rotated"]}, "transforms has 'rotated'; close names: rotate"),
        ({"roundings": []}, "roundings=.*give a list of different values"),
        ({"groups": [0, 0]}, "groups=.*give a list of different values"),
        ({"groups": [-1]}, "inputs that share a scale"),
        ({"weight_choices": [4, 16]}, "16 is no treatment"),
        ({"weight_choices": [1]}, "bit-widths from 2 to 8"),
        ({"symmetric": "yes"}, "must be true or false"),
        ({"held_out": 0}, "held_out=0 must be a whole number"),
        ({"budget": {"size": None}}, "has no budget"),
        ({"budget": {"size_bytes": 3e6}}, "no field 'size_bytes'; it has .*size"),
        ({"budget": {"size": -1}}, "size=-1 must be a number above 0"),
        ({"budget": {"latency": 0.6, "latency_costs": {"w8a8": 0.6}}}, "does not say what rotate adds"),
        ({"budget": {"latency": 0.6, "latency_costs": {"rotate": -0.1}}}, "rotate: -0.1; give what it adds"),
        ({"budget": {"latency": 0.6, "latency_costs": {"turn": 0.1}}}, "no scheme such as w4a8 .*, nor one of none"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        TreatmentSearch(**{**SETTINGS, **changes})


def test_a_recipe_that_says_what_is_searched_is_refused() -> None:
    search = TreatmentSearch(**SETTINGS)
    plan = search.plan(Recipe(segments=EDGES, rules=[{"pattern": "*.fc2", "keep_float": True}]), [*ROLES], ["*.1.fc1"])  # type: ignore[list-item]
    assert {*plan.layers} == {"blocks.0.fc1"} and plan.edges == EDGES
    with pytest.raises(UserError, match="the search chooses it"):
        search.plan(Recipe(QuantSpec(8, granularity="channel")), [*ROLES], [])
    with pytest.raises(UserError, match=r"rule '\*.fc2' says how to quantize"):
        rule = {"pattern": "*.fc2", "weight": QuantSpec(8, granularity="channel")}
        search.plan(Recipe(rules=[rule]), [*ROLES], [])  # type: ignore[list-item]
