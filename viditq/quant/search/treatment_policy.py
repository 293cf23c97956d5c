"""The policy `treatments`: one search over all that can be done to each part, under one budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from viditq.errors import UserError
from viditq.quant.description.fields import is_int
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.recipe import Recipe, Rule
from viditq.quant.search.allotment import Part
from viditq.quant.search.budget import Budget
from viditq.quant.search.candidates import groups_of
from viditq.quant.search.treatments import ROTATING, TRANSFORMS, Menu

INSTEAD = (
    "Leave it out (quant=none, as experiment=best has it), and say what there is to choose from by quant.policy "
    "(transforms, weight_choices, groups, roundings, ...)."
)
OWN = "the search chooses it for each part"


@dataclass(frozen=True)
class SizedBudget(Budget):
    """Upper limits as of `Budget`.

    size: of the whole artifact; up to 1 a share of the denoiser in 16 bits, above 1 bytes. latency_costs may name
    transforms, and has to name those that rotate.
    """

    additions: ClassVar[tuple[str, ...]] = (*TRANSFORMS,)

    size: float | None = None

    def bytes_of(self, float_bytes: float) -> float | None:
        """The limit of bytes. float_bytes: of the denoiser in 16 bits."""
        return None if self.size is None else self.size * (float_bytes if self.size <= 1 else 1)


@dataclass(frozen=True)
class TreatmentSearch:
    """Settings of the search. budget: see `SizedBudget`. symmetric: zero points of 0 only, as exports and the fastest
    backends want. transforms ... low_ranks: see `Menu`. held_out: of the calibration prompts, those that are not
    calibrated on, which errors are measured on and finalists generated for; num_steps, step_prompts: how many steps of
    how many of these tell what each part matters.
    """

    budget: Mapping[str, Any]
    symmetric: bool
    transforms: Sequence[str]
    weight_choices: Sequence[int]
    activation_choices: Sequence[int]
    groups: Sequence[int]
    roundings: Sequence[str]
    ranges: Sequence[str]
    low_ranks: Sequence[int]
    held_out: int
    num_steps: int
    step_prompts: int
    parsed_budget: SizedBudget = field(init=False)
    menu: Menu = field(init=False)
    files: ClassVar[Sequence[Path]] = ()

    def __post_init__(self) -> None:
        known = [f.name for f in fields(SizedBudget) if f.name != "size_bytes"]
        for name in self.budget:
            if name not in known:
                raise UserError(f"quant.policy.budget has no field {name!r}; it has {', '.join(known)}.")
        object.__setattr__(self, "parsed_budget", SizedBudget(**self.budget))
        object.__setattr__(self, "menu", Menu(*(getattr(self, f.name) for f in fields(Menu))))
        costs = self.parsed_budget.latency_costs or {}
        unknown = [name for name in self.menu.transforms if name in ROTATING and name not in costs]
        if self.parsed_budget.latency is not None and unknown:
            raise UserError(
                f"quant.policy.budget.latency_costs does not say what {unknown[0]} adds: give it beside the schemes, "
                f"such as {{w8a8: 0.58, {unknown[0]}: 0.1}}, or leave it out of quant.policy.transforms."
            )
        if not isinstance(self.symmetric, bool):
            raise UserError(f"quant.policy.symmetric={self.symmetric!r} must be true or false.")
        for name in ("held_out", "num_steps", "step_prompts"):
            if not is_int(getattr(self, name)) or getattr(self, name) < 1:
                raise UserError(f"quant.policy.{name}={getattr(self, name)!r} must be a whole number of at least 1.")

    def plan(self, recipe: Recipe, linear_names: Sequence[str], keep_float: Sequence[str]) -> QuantPlan:
        """What is calibrated for: every Linear with the menu's most demanding treatment.

        Raises UserError for a recipe that says what the search is there to find.
        """
        plain = Recipe()
        for name in ("weight", "activation", "smoothing", "rounding", "ranges", "activation_ranges", "low_rank"):
            if getattr(recipe, name) != getattr(plain, name):
                raise UserError(f"quant.{name} is set, but {OWN}. {INSTEAD}")
        for rule in recipe.rules:
            if not rule.keep_float:
                raise UserError(f"The rule {rule.pattern!r} says how to quantize, but {OWN}. {INSTEAD}")
        treatment = self.menu.demanding
        scheme = treatment.scheme(self.symmetric)
        kept = [Rule(pattern, keep_float=True) for pattern in keep_float]
        whole = Recipe(scheme.weight, scheme.activation, segments=recipe.edges, rules=[*kept, *recipe.rules])
        quantized = whole.resolve(linear_names)
        if not quantized.layers:
            raise UserError("quant/policy=treatments: every Linear is kept in float, so there is nothing to search.")
        names = (treatment.name,) * quantized.num_segments
        return QuantPlan(quantized.edges, {treatment.name: scheme}, dict.fromkeys(quantized.layers, names))

    def parts(self, base: QuantPlan, roles: Mapping[str, str], shapes: Mapping[str, tuple[int, int]]) -> list[Part]:
        """What is treated alike: the Linears of one role in one block. shapes: (out_features, in_features) of each.

        Raises UserError where nothing of the menu is possible for one.
        """
        numel = {name: rows * columns for name, (rows, columns) in shapes.items()}
        groups = groups_of([*base.layers], roles, numel, {name: columns for name, (_, columns) in shapes.items()})
        found = []
        for group in groups:
            of_layers = tuple(shapes[layer] for layer in group.layers)
            found.append(Part(group, of_layers, self.menu.possible(of_layers), base.num_segments, self.symmetric))
        return found
