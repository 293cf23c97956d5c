"""What a pipeline's source and its folder say of it, told without importing torch or diffusers, which takes seconds.

Only what is wrong beyond doubt is refused here; of what cannot be told like this nothing is said.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from viditq.errors import UserError, no_linear
from viditq.files import is_whole, stored_entries
from viditq.models.checks import check_arguments, check_call, check_parts, given_to_call, reads_words
from viditq.models.mismatch import WRAPPERS
from viditq.models.roles import check_keep_float

OWN_PIPELINES = ("OpenSoraPipeline",)
NO_PIPELINE = "model.pipeline={!r} is no pipeline class of diffusers {}. The folder was made for {}."
OTHER_KINDS = ("models", "schedulers")  # what diffusers lists under these is no pipeline
METHODS = ("__init__", "__call__", "encode_prompt")
# Parts of names that are others in the model: diffusers replaces them when it loads, or they are pieces of a weight.
RENAMED = ("query", "key", "value", "proj_attn", "parametrizations", "weight_g", "weight_v")


def check_outline(model: Any, folder: Path, rules: Sequence[str]) -> None:
    """Raises UserError for a pipeline class or patterns of Linears that do not go with the files in `folder`.

    model: the fields of a ModelAdapter, of which the values are allowed, and that folder. rules: patterns of
    quant.rules.
    """
    if not model.guess and model.pipeline not in OWN_PIPELINES:
        _check_pipeline(model, folder / "model_index.json")
    names = layer_names(folder, model.denoisers or ()) if model.denoiser_path is None else None
    if not names:
        return
    several = len(model.denoisers) > 1
    if not model.guess:
        check_keep_float(model.name, model.keep_float, [n.split(".", 1)[1] if several else n for n in names])
    for pattern in rules:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(no_linear(pattern, names))


def _check_pipeline(model: Any, file: Path) -> None:
    name, index = model.pipeline, json.loads(file.read_text()) if is_whole(file) else None
    if not isinstance(index, dict):
        return
    listed = listed_in(_root() / "__init__.py")
    if listed and {*listed.get(name, ["models"])} <= {*OTHER_KINDS}:
        raise UserError(NO_PIPELINE.format(name, version("diffusers"), index.get("_class_name")))
    cls = outline_of(name)
    if cls is not None:
        check_parts(cls, index)
        check_call(cls, given_to_call(model))
        check_arguments(model, cls)


def _root() -> Path:
    found = find_spec("diffusers")
    places = (found and found.submodule_search_locations) or ["/"]
    return Path(places[0])


@cache
def listed_in(init: Path) -> dict[str, list[str]]:
    """Name -> the keys of `_import_structure` that a package of diffusers lists it under; empty where it has none."""
    found: dict[str, list[str]] = {}
    tree = ast.parse(init.read_text(encoding="utf-8")) if init.is_file() else ast.Module([], [])
    for node in ast.walk(tree):
        target = node.func.value if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
        target = node.targets[0] if isinstance(node, ast.Assign) else target
        if isinstance(target, ast.Subscript) and ast.unparse(target.value) == "_import_structure":
            key = str(ast.literal_eval(target.slice))
            strings = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
            for name in strings:
                found.setdefault(name, []).append(key)
    return found


@cache
def outline_of(name: str) -> Any:
    """A class with the name and the signatures of a pipeline of diffusers; None where its source does not tell all."""
    for package in listed_in(_root() / "pipelines" / "__init__.py").get(name, []):
        folder = _root() / "pipelines" / package
        for module in listed_in(folder / "__init__.py").get(name, []):
            file = folder / f"{module}.py"
            body = ast.parse(file.read_text(encoding="utf-8")).body if file.is_file() else []
            for node in body:
                if isinstance(node, ast.ClassDef) and node.name == name:
                    return _outline(node)
    return None


def _outline(node: ast.ClassDef) -> Any:
    methods = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name in METHODS]
    optional = [
        n for n in node.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "_optional_components"
    ]
    if not {method.name for method in methods} >= {*METHODS[:2]}:  # inherited
        return None
    attributes: dict[str, Any] = {"from_pretrained": None, "_optional_components": ()}
    attributes |= {ast.unparse(assigned.targets[0]): ast.literal_eval(assigned.value) for assigned in optional}
    found = type(node.name, (), attributes | {method.name: _of_signature(method.args) for method in methods})
    encodes = hasattr(found, "encode_prompt") or reads_words(found)  # else it is inherited, or there is no text
    return found if encodes else None


def _of_signature(given: ast.arguments) -> Any:
    """A function of these arguments, of whose defaults it is only known that there are some."""
    kinds = inspect.Parameter
    plain = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(plain) - len(given.defaults)) + given.defaults
    found: list[tuple[ast.arg, Any, ast.expr | None]]
    found = [(a, kinds.POSITIONAL_OR_KEYWORD, default) for a, default in zip(plain, defaults, strict=True)]
    found += [(given.vararg, kinds.VAR_POSITIONAL, None)] if given.vararg else []
    found += [(a, kinds.KEYWORD_ONLY, d) for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    found += [(given.kwarg, kinds.VAR_KEYWORD, None)] if given.kwarg else []

    def function() -> None:
        """Only its signature counts."""

    parameters = [kinds(a.arg, kind, default=kinds.empty if d is None else d) for a, kind, d in found]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return function


def layer_names(folder: Path, denoisers: Sequence[str]) -> list[str] | None:
    """All that may be a Linear of these denoisers, by the names and shapes that their weights' files say.

    As in `ModelAdapter.denoiser_of` the part's name comes first where there are several. None where they do not tell.
    """
    names: list[str] = []
    for part in denoisers:
        files = sorted((folder / part).glob("*.safetensors"))
        try:
            stored = {name: entry for file in files for name, entry in stored_entries(file).items()}
        except (OSError, ValueError, KeyError):
            return None
        two_axes = [name for name, entry in stored.items() if name.endswith(".weight") and len(entry["shape"]) == 2]
        others = (*RENAMED, *(piece.strip(".") for piece in WRAPPERS))
        if not two_axes or any(f".{word}." in f".{name}." for name in stored for word in others):
            return None
        names += [name.removesuffix(".weight") if len(denoisers) == 1 else f"{part}.{name}" for name in two_axes]
    return [name.removesuffix(".weight") for name in names]
