"""What a `_target_` of the configuration takes, read from its source: importing it may take seconds."""

import ast
import functools
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
REQUIRED = object()  # in place of a default that there is none of


@functools.cache  # a sweep asks the same of each of its runs
def arguments_of(target: str) -> Mapping[str, Any] | None:
    """Argument -> its default, or REQUIRED, of the class or function called `target`.

    None where the source alone does not tell: outside of viditq, handed on from another module, with `**` arguments,
    or with arguments that a class inherits.
    """
    module, _, name = target.rpartition(".")
    package, *parts = module.split(".")
    file = PACKAGE.joinpath(*parts).with_suffix(".py") if parts else PACKAGE / "__init__.py"
    if package != PACKAGE.name or not file.is_file():
        return None
    body = ast.parse(file.read_text(encoding="utf-8")).body
    found = next((n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == name), None)
    if isinstance(found, ast.ClassDef):
        return _of_class(found)
    return None if found is None else _of_function(found.args.args, found.args)


def _of_class(node: ast.ClassDef) -> dict[str, Any] | None:
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init is not None and [ast.unparse(base) for base in node.bases] == ["L.Trainer"]:  # hands the rest to Lightning
        own, inherited = _of_function(init.args.args[1:], init.args, named_alone=True), _of_lightning()
        return None if own is None or inherited is None else own | inherited
    if init is not None:
        return _of_function(init.args.args[1:], init.args)
    if node.bases or not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return None
    fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    fields = [f for f in fields if "ClassVar" not in ast.unparse(f.annotation)]
    given = [f for f in fields if not (isinstance(f.value, ast.Call) and "init=False" in ast.unparse(f.value))]
    return {ast.unparse(field.target): _default(field.value) for field in given}


def _of_lightning() -> dict[str, Any] | None:
    """The arguments of Lightning's Trainer; None where its source lies in another place than it does today."""
    found = find_spec("lightning")
    places = (found and found.submodule_search_locations) or []
    files = [file for place in places if (file := Path(place, "pytorch", "trainer", "trainer.py")).is_file()]
    for node in ast.parse(files[0].read_text(encoding="utf-8")).body if files else ():
        if isinstance(node, ast.ClassDef) and node.name == "Trainer":
            return _of_class(node)
    return None


def _of_function(
    positional: Sequence[ast.arg], arguments: ast.arguments, named_alone: bool = False
) -> dict[str, Any] | None:
    if arguments.kwarg is not None and not named_alone:
        return None
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    pairs = [*zip(positional, defaults, strict=True), *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return {argument.arg: _default(default) for argument, default in pairs}


def _default(node: ast.expr | None) -> Any:
    """The value of a literal, or of `field(default_factory=dict)`; of anything else its text."""
    if node is None:
        return REQUIRED
    if isinstance(node, ast.Call):
        node = next((keyword.value for keyword in node.keywords if keyword.arg == "default_factory"), node)
    try:
        return ast.literal_eval(node)
    except ValueError:
        text = ast.unparse(node)
        return {"dict": {}, "list": []}.get(text, text)


def unknown_key(node: Any, where: str = "") -> tuple[str, Sequence[str]] | None:
    """The first key below `node` (plain values) that no constructor takes, by its full name, with those it takes."""
    if isinstance(node, Mapping):
        taken = arguments_of(str(node["_target_"])) if "_target_" in node else None
        for key in node:
            if taken is not None and key not in taken and not (key.startswith("_") and key.endswith("_")):
                return f"{where}{key}", list(taken)
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    return next((found for key, inner in items if (found := unknown_key(inner, f"{where}{key}."))), None)
