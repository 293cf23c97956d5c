"""The parts of a pipeline, told from model_index.json and its class, and what viditq can do with them."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from types import UnionType
from typing import Any

import diffusers
import transformers.processing_utils  # whose import makes `transformers` anew, without what diffusers adds to it (PRX)
from diffusers.utils import import_utils
from torch import nn

from viditq.errors import UserError
from viditq.models.checks import check_parts
from viditq.models.outline import NO_PIPELINE
from viditq.models.registry import find_class

TEXT = ("text_", "tokenizer")  # begin the names of parts that only encode prompts
NAMES = r"(unconditional_)?(transformer|unet|dit)(_\d+)?"
RESIZE = ("Cosmos2", "CosmosT", "CosmosV", "OmniGen")  # begin the names of pipelines that do so by torchvision
DENOISERS = ("diffusers.models.transformers", "diffusers.models.unets", "viditq.models.stdit")


def is_entry(value: Any) -> bool:
    """Whether a value of model_index.json names a part: [library, class], both null where there is none."""
    return isinstance(value, list) and len(value) == 2 and all(one is None or isinstance(one, str) for one in value)


def told_apart(index: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a model_index.json whose lists name parts alone: settings that are lists are tuples."""
    return {name: tuple(v) if isinstance(v, list) and not is_entry(v) else v for name, v in index.items()}


def part_class(entry: Any) -> Any:
    """The class that an entry [library, class] of model_index.json names; None where there is none."""
    if not isinstance(entry, list) or entry[0] is None:
        return None
    library, name = entry
    of_pipeline = getattr(diffusers.pipelines, library, None) if library not in ("diffusers", "transformers") else None
    if of_pipeline is not None and hasattr(of_pipeline, name):
        return getattr(of_pipeline, name)
    return getattr(transformers, name, None) if library == "transformers" else find_class(name)


def models_of(index: Mapping[str, Any]) -> dict[str, Any]:
    """Part -> class, of the parts of a pipeline that are neural networks."""
    found = {name: part_class(entry) for name, entry in index.items()}
    return {name: cls for name, cls in found.items() if isinstance(cls, type) and issubclass(cls, nn.Module)}


def is_denoiser(name: str, entry: Any) -> bool:
    """Whether a part has a denoiser's class, or the name of one."""
    cls = part_class(entry)
    module = getattr(cls, "__module__", "")
    named = isinstance(entry, list) and entry[0] is not None and re.fullmatch(NAMES, name) is not None
    return named or module.startswith(DENOISERS)


def check_pipeline(name: str, index: Mapping[str, Any]) -> None:
    """Raises UserError if `name` is no pipeline class, or one of other parts than the folder has."""
    found = find_class(name)
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
        raise UserError(NO_PIPELINE.format(name, diffusers.__version__, index.get("_class_name")))
    check_parts(found, index)
    _check_packages(name, index)


def _check_packages(pipeline: str, index: Mapping[str, Any]) -> None:
    """Raises UserError for a pipeline that fails without a package, late and in words of its own."""
    wanted = []
    if pipeline.startswith("Cosmos") and index.get("enable_safety_checker", True):  # Cosmos 3's may be off
        wanted += [] if import_utils.is_cosmos_guardrail_available() else ["cosmos_guardrail"]
    if pipeline.startswith(RESIZE) and not import_utils.is_torchvision_available():
        wanted.append("torchvision")
    if wanted:
        why = " (Its licence asks for the checker of prompts and clips, which cosmos_guardrail holds.)"
        raise UserError(
            f"{pipeline} needs packages that are not installed here: pip install {' '.join(wanted)}."
            + why * ("cosmos_guardrail" in wanted)
        )


def check_denoiser_class(pipeline: str, part: str, denoiser: nn.Module) -> None:
    """Raises UserError where the pipeline says which classes it takes, and this is none of them."""
    try:
        hint = typing.get_type_hints(find_class(pipeline).__init__).get(part)
    except (NameError, TypeError):  # a hint that only type checkers can resolve
        return
    allowed = typing.get_args(hint) if typing.get_origin(hint) in (UnionType, typing.Union) else (hint,)
    classes = tuple(cls for cls in allowed if isinstance(cls, type) and issubclass(cls, nn.Module))
    if classes and not isinstance(denoiser, classes):
        raise UserError(
            f"model.pipeline={pipeline} takes {' or '.join(cls.__name__ for cls in classes)} as {part}; the folder has "
            f"{type(denoiser).__name__}. Give the pipeline class that the folder was made for."
        )


def check_denoisers(denoisers: list[str], left_in_float: list[str], index: Mapping[str, Any]) -> None:
    """Raises UserError unless every denoiser of the folder is named, once: to be quantized or to be left in float."""
    parts = [name for name, entry in index.items() if isinstance(entry, list)]
    for key, names in {"denoisers": denoisers, "float_denoisers": left_in_float}.items():
        for name in names:
            if index.get(name, [None])[0] is None:
                raise UserError(
                    f"model.{key} has {name!r}, which is no part of the pipeline; it has {', '.join(parts)}."
                )
    if odd := [name for name in left_in_float if not is_denoiser(name, index[name])]:
        raise UserError(f"model.float_denoisers has {odd[0]!r}, which is no denoiser and is never quantized.")
    if both := sorted({*denoisers} & {*left_in_float}):
        raise UserError(f"model.denoisers and model.float_denoisers both have {both[0]}; leave it out of one.")
    others = [n for n in parts if is_denoiser(n, index[n]) and n not in (*denoisers, *left_in_float)]
    if others:
        raise UserError(
            f"The pipeline has denoisers that model.denoisers={_listed(denoisers)} does not name: {', '.join(others)}. "
            "They would run in float without a word. Take the yaml of this very model, or quantize them too "
            f"(model.denoisers={_listed([*denoisers, *others])}), or leave them in float on purpose "
            f"(+model.float_denoisers={_listed(others)})."
        )


def _listed(names: list[str]) -> str:
    return f"[{','.join(names)}]"
