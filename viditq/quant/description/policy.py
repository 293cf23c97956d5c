"""Policies: which plan a denoiser gets, from a recipe alone or from a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Protocol

from viditq.assets import resolve_plan
from viditq.errors import UserError
from viditq.files import read_mapping
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
        plan = _plan_for(linear_names, text, self.path)
        for layer, schemes in plan.layers.items():
            if any(schemes) and any(fnmatchcase(layer, pattern) for pattern in keep_float):
                raise UserError(
                    f"{self.path} quantizes {layer!r}, which this model keeps in float (model.keep_float). Take it out "
                    "of the plan; or if it is meant, out of model.keep_float, and give it a role (model.roles)."
                )
        return plan


@dataclass(frozen=True)
class StoredArtifact:
    """An artifact made before, by another run or by `viditq import`: its codes are taken as they are.

    path: its folder, or that of its run.
    """

    path: str

    def __post_init__(self) -> None:
        folder = self.folder
        absent = [name for name in ("plan.json", "meta.json") if not (folder / name).is_file()]
        if absent:
            raise UserError(
                f"{folder} holds no quantized model ({absent[0]} is missing): give the folder of an artifact or of its "
                "run; of another program's file make one with `viditq import`."
            )
        told = read_mapping(folder / "meta.json", ["format_version", "sha256"])
        if told["format_version"] != 3:
            raise UserError(
                f"{folder} has format version {told['format_version']}; judged as they are 3: make it anew."
            )
        if told.get("text_encoders"):
            raise UserError(
                f"{folder} has quantized text encoders, which this run would leave out: samples would be of another "
                "model. Judge it by the run that made it."
            )

    @property
    def folder(self) -> Path:
        """Of the artifact itself."""
        folder = Path(self.path).expanduser()
        return folder / "quantized" if (folder / "quantized").is_dir() else folder

    @property
    def files(self) -> Sequence[Path]:
        """All of the artifact's."""
        return sorted(path for path in self.folder.iterdir() if path.is_file())

    @property
    def digest(self) -> str:
        """Of everything that the artifact holds."""
        return str(read_mapping(self.folder / "meta.json", ["sha256"])["sha256"]["meta.json"])

    def check_model(self, model: Mapping[str, Any]) -> None:
        """Raises UserError where the artifact is of another kind of model. model: as meta.json has it."""
        mine: Mapping[str, Any] = read_mapping(self.folder / "meta.json", []).get("model", {})
        for key in ("pipeline", "denoisers", "dtype"):
            if key in mine and mine[key] != model[key] and [*mine[key]] != [*model[key]]:
                raise UserError(
                    f"{self.path} was made with model.{key}={mine[key]}, and this run has {model[key]}: give the model "
                    f"that it was made from, with model.{key}={mine[key]}."
                )

    def plan(self, recipe: Recipe, linear_names: Sequence[str], keep_float: Sequence[str]) -> QuantPlan:
        """The artifact's plan, whatever the model keeps in float elsewhere; UserError for a plan of another model."""
        return _plan_for(linear_names, (self.folder / "plan.json").read_text(), self.path)


def _plan_for(linear_names: Sequence[str], text: str, path: str) -> QuantPlan:
    plan = QuantPlan.from_json(text)
    unknown = sorted(set(plan.layers) - set(linear_names))
    if unknown:
        raise UserError(f"{path} quantizes {unknown[0]!r}, which is no Linear of this model.")
    return plan
