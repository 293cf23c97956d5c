"""Policies: which plan a denoiser gets, from a recipe alone or from a file."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import ClassVar, Protocol

from viditq.assets import resolve_plan
from viditq.errors import UserError
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.recipe import Recipe, Rule


class Policy(Protocol):
    """Turns a recipe into the plan of one model (mixed precision or not). files: all that it reads for that."""

    @property
    def files(self) -> Sequence[Path]:
        """Such as a plan.json."""

    def plan(self, recipe: Recipe, linear_names: Sequence[str], keep_float: Sequence[str]) -> QuantPlan:
        """The plan for these Linears; those matching `keep_float` stay in float unless a rule says otherwise."""


@dataclass(frozen=True)
class Uniform:
    """The same scheme everywhere, but for the recipe's own rules."""

    files: ClassVar[Sequence[Path]] = ()

    def plan(self, recipe: Recipe, linear_names: Sequence[str], keep_float: Sequence[str]) -> QuantPlan:
        """The recipe with the model's kept Linears put before its rules."""
        kept = [Rule(pattern, keep_float=True) for pattern in keep_float]
        return recipe.with_rules([*kept, *recipe.rules]).resolve(linear_names)


@dataclass(frozen=True)
class PlanFile:
    """A plan made before: by a search, by hand, copied from another run (plan.json), or one that is shipped."""

    path: str

    def __post_init__(self) -> None:
        resolve_plan(self.path)

    @property
    def files(self) -> Sequence[Path]:
        """The plan's file."""
        return [resolve_plan(self.path)]

    def plan(self, recipe: Recipe, linear_names: Sequence[str], keep_float: Sequence[str]) -> QuantPlan:
        """The file's plan; the recipe is not consulted. Raises UserError if it names Linears that the model lacks or
        keeps in float."""
        try:
            text = resolve_plan(self.path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path} cannot be read as a plan.json: {error}") from error
        plan = QuantPlan.from_json(text)
        unknown = sorted(set(plan.layers) - set(linear_names))
        if unknown:
            raise UserError(f"{self.path} quantizes {unknown[0]!r}, which is no Linear of this model.")
        for layer, schemes in plan.layers.items():
            if any(schemes) and any(fnmatchcase(layer, pattern) for pattern in keep_float):
                raise UserError(
                    f"{self.path} quantizes {layer!r}, which this model keeps in float (model.keep_float). Take it out "
                    "of the plan; or if it is meant, out of model.keep_float, and give it a role (model.roles)."
                )
        return plan
