"""What a pipeline without a yaml of its own needs, read from its model_index.json and its class's code."""

import ast
import inspect
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from viditq.errors import UserError
from viditq.models.checks import conditions_of_call, makes_clips, no_encoding, reads_words
from viditq.models.parts import NAMES
from viditq.models.registry import find_class

REQUIRED = {"do_classifier_free_guidance": True, "num_images_per_prompt": 1, "num_videos_per_prompt": 1}
PLAIN = {"clean_caption": False, "use_resolution_binning": False}  # what needs another package or changes the size
UNCHANGED = {"enable_prompt_rewrite": False, "use_pe": False}  # the prompt, which a language model would write anew


def guess_settings(index: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fields of ModelAdapter -> values, from the content of model_index.json.

    given: fields that have a value, None = they have not: they are not guessed. Raises UserError where the pipeline's
    class is unknown or does not encode prompts apart from its call, and for what is neither understood nor given.
    """
    given = given or {}
    name = str(given.get("pipeline") or index.get("_class_name"))
    cls = find_class(name)
    if cls is None:
        raise UserError(f"The pipeline class {name} that the folder names is none of diffusers; set model.pipeline.")
    encodes = hasattr(cls, "encode_prompt")
    if not encodes and not reads_words(cls):
        raise UserError(no_encoding(name))
    of_call = inspect.signature(cls.__call__).parameters
    of_text = {**inspect.signature(cls.encode_prompt).parameters} if encodes else {}
    denoisers = given.get("denoisers") or _denoisers(index)
    outputs = given.get("encode_outputs") or (_encode_outputs(cls, set(of_call)) if encodes else [])
    asked = of_text if any(outputs) else {}  # else it is the call that knows what to encode with
    encode = {k: REQUIRED.get(k) for k, p in asked.items() if k not in ("self", "prompt") and _required(p)}
    if "do_classifier_free_guidance" in asked and _is_unguided(of_call, given):
        encode["do_classifier_free_guidance"] = False  # AnyFlow samples a negative prompt that is there all the same
    return {
        "pipeline": name,
        "modality": "video" if makes_clips(cls) else "image",
        "conditions": conditions_of_call(cls),
        "denoisers": denoisers,
        "encode_outputs": outputs,
        "encode": encode | {k: v for k, v in PLAIN.items() if k in asked},
        "call": {k: v for k, v in {**PLAIN, **UNCHANGED}.items() if k in of_call}
        | ({"mask_feature": False} if "mask_feature" in of_call else {}),
    }


def _is_unguided(of_call: Mapping[str, inspect.Parameter], given: Mapping[str, Any]) -> bool:
    """Whether the guidance that is given, or else the call's own, is none."""
    argument = of_call.get(str(given.get("guidance_argument", "guidance_scale")))
    scale = given.get("guidance_scale") or (argument.default if argument else None)
    return isinstance(scale, int | float) and scale <= 1


def _required(parameter: inspect.Parameter) -> bool:
    plain = parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    return plain and parameter.default is inspect.Parameter.empty


def _denoisers(index: Mapping[str, Any]) -> list[str]:
    found = [
        name
        for name, value in index.items()
        if isinstance(value, list) and value[0] is not None and re.fullmatch(NAMES, name)
    ]
    if not found:
        raise UserError(
            "The pipeline has no part named transformer or unet; name its denoisers: model.denoisers=[...]."
        )
    return found


def _encode_outputs(cls: type, of_call: set[str]) -> list[str | None]:
    """Names of what `encode_prompt` returns, as far as `__call__` takes them; None for the others.

    They are those that its return statements have, or, where more of them are known, those that `__call__` gives them.
    Where it takes none of them, or has to be given the prompt again, all are None. Blocks say it themselves.
    """
    if said := getattr(cls, "returned", None):
        return [name if name in of_call else None for name in said]
    returned, assigned = returned_names(cls), _assigned_names(cls)
    if gives_prompt_again(cls) and assigned:
        return [None] * len(assigned[0])
    known = [[name if name in of_call else None for name in names] for names in [*returned, *assigned]]
    best = max(filter(any, known), key=lambda names: sum(name is not None for name in names), default=[])
    if not best and (unknown := max([*returned, *assigned], key=len, default=[])):
        return [None] * len(unknown)
    if not any(name is not None and "prompt_embeds" in name and "negative" not in name for name in best):
        raise UserError(
            f"What {cls.__name__}.encode_prompt returns is not understood; name it: model.encode_outputs=[...]."
        )
    return best


def gives_prompt_again(cls: type) -> bool:
    """Whether a pipeline's call has to be given the prompt whatever it takes of what `encode_prompt` returns.

    It requires one (SANA-WM), or encodes it by several calls, each for arguments of its own (Hunyuan-DiT: a call for
    each text encoder).
    """
    of_call = inspect.signature(cls.__call__).parameters  # type: ignore[operator]
    parts = {tuple(names) for names in _assigned_names(cls) if any(_is_positive(n) for n in names if n in of_call)}
    return len(parts) > 1 or ("prompt" in of_call and _required(of_call["prompt"]))


def _is_positive(name: str) -> bool:
    return "negative" not in name


def _assigned_names(cls: type) -> list[list[str]]:
    """What `__call__` calls the values that `encode_prompt` returns, for each of its calls."""
    return [
        _names(node.targets[0])
        for node in _nodes(cls, "__call__", ast.Assign)
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "self.encode_prompt"
    ]


def returned_names(cls: type) -> list[list[str]]:
    """What the values that `encode_prompt` returns are called in it, for each of its return statements.

    One name alone is one value: ERNIE-Image's list of a tensor for each prompt.
    """
    found = [node.value for node in _nodes(cls, "encode_prompt", ast.Return)]
    return [[value.id] if isinstance(value, ast.Name) else _names(value) for value in found]


def _nodes(cls: type, method: str, kind: type) -> list[Any]:
    """The statements of one kind in a method's source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(cls, method))))
    return [node for node in ast.walk(tree) if isinstance(node, kind)]


def _names(value: ast.expr | None) -> list[str]:
    """Of a tuple of names; what is another expression in it has none. Of anything else: nothing."""
    return [_name(element) for element in value.elts] if isinstance(value, ast.Tuple) else []


def _name(value: ast.expr) -> str:
    """Of `name`, `name if ... else None` and `name.to(...)`."""
    if isinstance(value, ast.IfExp):
        return _name(value.body)
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "to":
        return _name(value.func.value)
    return value.id if isinstance(value, ast.Name) else ""
