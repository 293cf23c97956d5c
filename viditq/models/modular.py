"""Modular pipelines of diffusers (FLUX.3), driven as all others are: by a class with `encode_prompt` and a call.

A modular pipeline is a row of blocks, and diffusers' own call runs them all. Here the block that encodes the prompt is
run apart from those that denoise and decode, each time by a pipeline of diffusers made of these blocks alone.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModularPipeline, SequentialPipelineBlocks
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import nn

from viditq.assets import INDICES
from viditq.errors import UserError
from viditq.files import read_json
from viditq.models.weight_files import COPY_AGAIN, variant_of

PLAIN, MODULAR = INDICES
MADE = "_made"
"""In an index, beside its parts: those that have no folder, and the settings that the pipeline makes them of."""
REWRITES = "prompt_upsampler"  # begins the name of a block, and of its parts, that would write the prompt anew
ENCODES, DECODES = "text_encoder", "decode"  # names of blocks
TALKATIVE = ("diffusers.modular_pipelines.modular_pipeline", "diffusers.guiders.guider_utils")
NAMED = inspect.Parameter.POSITIONAL_OR_KEYWORD


class Driver(DiffusionPipeline):
    """A pipeline of diffusers whose code is the blocks of `modular`. returned: what encodes a prompt returns."""

    modular: Any = ModularPipeline
    returned: tuple[str, ...] = ()
    model_cpu_offload_seq = "text_encoder->transformer->vae"

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: Path, dtype: Any = None, variant: str | None = None, local_files_only: bool = True, **parts: Any
    ) -> Driver:
        """The pipeline in `folder`; `parts` replace its own. dtype: of its models, or a mapping with `default`."""
        index = read_index(folder)
        dtypes = dtype if isinstance(dtype, Mapping) else {"default": dtype}
        wanted = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", *parts)]
        return cls(**parts, **{name: _loaded(folder, index, name, variant, dtypes) for name in wanted})

    def _made_of(self, blocks: Mapping[str, Any], guidance_scale: float | None = None) -> Any:
        """diffusers' pipeline of these blocks alone, with the parts of this one."""
        row = SequentialPipelineBlocks.from_blocks_dict({**copy.deepcopy(blocks)})
        for block in _all_blocks(row):
            if hasattr(block, "set_progress_bar_config"):
                block.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        device = property(lambda _: self._execution_device)
        pipeline = type(self.modular.__name__, (self.modular,), {"_execution_device": device})(blocks=row)
        for name, part in self.components.items():
            if name in pipeline._component_specs:
                setattr(pipeline, name, part)
        if guidance_scale is not None and hasattr(pipeline, "guider"):
            pipeline.guider = pipeline.guider.new(guidance_scale=guidance_scale)
        return pipeline


@contextmanager
def _quietly() -> Iterator[None]:
    """Within, blocks print no traceback of what they pass on (it may only end a trial), nor that guiders are new."""
    loggers = [logging.getLogger(name) for name in TALKATIVE]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _encode(self: Driver, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """What the pipeline's text block makes of a prompt."""
    given = inspect.signature(type(self).encode_prompt).bind(self, *args, **kwargs).arguments
    given.pop("self")
    with _quietly():
        state = self._made_of({ENCODES: _blocks_of(self.modular)[ENCODES]})(**given)
    return tuple(state.get(name) for name in self.returned)


@torch.no_grad()
def _call(self: Driver, *args: Any, **kwargs: Any) -> Any:
    """Sample, from a prompt or from what was encoded of one."""
    given = inspect.signature(type(self).__call__).bind(self, *args, **kwargs).arguments
    given.pop("self")
    guidance, as_class = given.pop("guidance_scale", None), given.pop("return_dict", True)
    latent = given.get("output_type") == "latent"
    blocks = {n: b for n, b in _blocks_of(self.modular).items() if n != ENCODES and not (latent and n == DECODES)}
    with _quietly():
        pipeline = self._made_of(blocks, guidance)
    asked = inspect.signature(self.encode_prompt).parameters
    told = {name: given.pop(name) for name in asked if name in given}
    if given.get(self.returned[0]) is None:
        if getattr(pipeline, "requires_unconditional_embeds", False) and told.get("negative_prompt") is None:
            told["negative_prompt"] = ""
        encoded = self.encode_prompt(**told)
        given |= dict(zip(self.returned, encoded if isinstance(encoded, tuple) else (encoded,), strict=True))
    known = _names(pipeline.blocks.inputs)
    with _quietly():
        out = pipeline(**{k: v for k, v in given.items() if k in known}, output="latents" if latent else "images")
    self.maybe_free_model_hooks()
    return ImagePipelineOutput(images=out) if as_class else (out,)


def driver(name: str) -> type[Driver] | None:
    """A class that drives the modular pipeline of that name; None where diffusers has none that makes pictures."""
    return _driver(name) if name.endswith("ModularPipeline") else None


@cache
def _driver(name: str) -> type[Driver] | None:
    modular: Any = getattr(diffusers, name, None)
    known = inspect.isclass(modular) and issubclass(modular, ModularPipeline)
    if not known or modular.default_blocks_name is None:
        return None
    blocks = _blocks_of(modular)
    if not blocks.keys() >= {ENCODES, DECODES} or "images" not in _names(blocks[DECODES].intermediate_outputs):
        return None
    whole = SequentialPipelineBlocks.from_blocks_dict(blocks)
    specs = {one.name: one for one in whole.expected_components}
    parts = {n: s for n, s in specs.items() if s.default_creation_method == "from_pretrained" or n == "scheduler"}
    returned = tuple(_names(blocks[ENCODES].intermediate_outputs))
    of_text, of_call = ({one.name: one.default for one in row.inputs if one.name} for row in (blocks[ENCODES], whole))
    of_call |= dict.fromkeys(returned) | {"return_dict": True}
    of_call |= {"guidance_scale": None} if "guider" in specs else {}
    attributes = {
        "modular": modular,
        "returned": returned,
        "__init__": _initializer({part: spec.type_hint for part, spec in parts.items()}),
        "encode_prompt": _named(_encode, "encode_prompt", of_text),
        "__call__": _named(_call, "__call__", of_call),
    }
    return type(name, (Driver,), attributes)


def _initializer(parts: Mapping[str, Any]) -> Any:
    """`__init__` of a pipeline of these parts: name -> its class."""

    def __init__(self: Driver, **given: Any) -> None:
        DiffusionPipeline.__init__(self)
        self.register_modules(**given)

    __init__.__annotations__ = {**parts}
    return _named(__init__, "__init__", dict.fromkeys(parts, inspect.Parameter.empty), parts)


def _named(plain: Any, name: str, defaults: Mapping[str, Any], kinds: Mapping[str, Any] | None = None) -> Any:
    """A copy of a method that takes these arguments and no others, as far as its signature says."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return plain(self, *args, **kwargs)

    named = [inspect.Parameter(n, NAMED, default=d, annotation=(kinds or {}).get(n, Any)) for n, d in defaults.items()]
    method.__name__, method.__doc__ = name, plain.__doc__
    method.__annotations__ = {**(kinds or {})}
    method.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("self", NAMED), *named]
    )
    return method


def _blocks_of(modular: Any) -> dict[str, Any]:
    """Name -> block, of a modular pipeline's usual ones, without that which writes prompts anew."""
    blocks = getattr(diffusers, modular.default_blocks_name)()
    return {name: block for name, block in blocks.sub_blocks.items() if not name.startswith(REWRITES)}


def _names(given: Sequence[Any]) -> list[str]:
    return [one.name for one in given if one.name]


def _all_blocks(block: Any) -> Iterator[Any]:
    yield block
    for inner in block.sub_blocks.values():
        yield from _all_blocks(inner)


# Files ----------------------------------------------------------------------------------------------------------------


def read_index(folder: Path) -> dict[str, Any]:
    """The content of model_index.json, or of a modular pipeline's index as that would have it.

    What only its blocks know of is in neither (a scheduler with their own settings): it is told under MADE.
    """
    if (folder / PLAIN).is_file() or not (folder / MODULAR).is_file():
        return _mapping(folder / PLAIN)
    values = _mapping(folder / MODULAR)
    cls = driver(str(values.get("_class_name")))
    parts = {name: _entry(value) for name, value in values.items() if isinstance(value, list) and len(value) == 3}
    if cls is None:
        return {"_class_name": values.get("_class_name"), **parts}
    wanted = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
    made = {name: spec for name, spec in _from_config(cls).items() if name in wanted and name not in parts}
    entries = parts | {name: [diffusers.__name__, spec.type_hint.__name__] for name, spec in made.items()}
    settings = {name: {**(spec.config or {})} for name, spec in made.items()}
    return {
        "_class_name": values["_class_name"],
        **{name: entries[name] for name in wanted if name in entries},
        MADE: settings,
    }


def _mapping(file: Path) -> dict[str, Any]:
    values = read_json(file, COPY_AGAIN)
    if not isinstance(values, dict):
        raise UserError(f"{file} is damaged: it holds {type(values).__name__}, not names and parts. {COPY_AGAIN}")
    for name, value in values.items():
        if file.name == MODULAR and isinstance(value, list) and len(value) == 3 and not isinstance(value[2], dict):
            raise UserError(f"{file} is damaged: {name} is {value!r}, not [library, class, where it is]. {COPY_AGAIN}")
    return values


def _from_config(cls: type[Driver]) -> dict[str, Any]:
    whole = SequentialPipelineBlocks.from_blocks_dict(_blocks_of(cls.modular))
    return {one.name: one for one in whole.expected_components if one.default_creation_method == "from_config"}


def _entry(value: Any) -> list[Any]:
    """[library, class] of a part, which was there when the index was written or is only said to be loaded so."""
    library, name, spec = value
    return [library, name] if library is not None else [*spec.get("type_hint", (None, None))]


def _loaded(folder: Path, index: Mapping[str, Any], name: str, variant: str | None, dtypes: Mapping[str, Any]) -> Any:
    library, class_name = index[name]
    cls = getattr(importlib.import_module(library), class_name)
    if name in index.get(MADE, {}):
        return cls.from_config(index[MADE][name])
    model = inspect.isclass(cls) and issubclass(cls, nn.Module)
    settings = {"dtype": dtypes.get(name, dtypes.get("default"))} if model else {}
    settings |= {"variant": variant_of(folder / name, variant)} if model else {}
    return cls.from_pretrained(folder / name, local_files_only=True, **settings)
