"""The text encoders of a pipeline, of transformers: their structure, and their tensors left in the files."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.mapped import mapped_tensors
from viditq.models.adapter import ModelAdapter
from viditq.models.contents import check_contents, check_finite, check_part
from viditq.models.dtypes import DTYPES
from viditq.models.parts import models_of
from viditq.models.weight_files import COPY_AGAIN, DAMAGED, TRANSFORMERS, variant_of, weight_files
from viditq.on_disk import leave_on_disk

ENCODER = "text_encoder"


def encoder_names(adapter: ModelAdapter) -> list[str]:
    """The parts that make embeddings of prompts, such as text_encoder and text_encoder_2.

    Raises UserError where there is none, or one that is not of transformers.
    """
    found = {name: cls for name, cls in models_of(adapter.index()).items() if name.startswith(ENCODER)}
    if not found:
        raise UserError(
            f"quant/text_encoder: {adapter.name} has no text encoder (conditioning={adapter.conditioning}). Leave it "
            "out, or give quant/text_encoder=none."
        )
    for name, cls in found.items():
        if not issubclass(cls, transformers.PreTrainedModel):
            raise UserError(
                f"quant/text_encoder: {name} of {adapter.folder} is a {cls.__name__}, which is no model of "
                "transformers; only those can be quantized. Give quant/text_encoder=none."
            )
    return [*found]


def build_encoder(adapter: ModelAdapter, name: str) -> nn.Module:
    """The structure of a text encoder from its config.json: parameters on the meta device, buffers real."""
    cls, folder = models_of(adapter.index())[name], adapter.part_folder(name, weights=False)
    try:
        config = cls.config_class.from_pretrained(folder)
        with init_empty_weights(include_buffers=False):
            encoder: Any = cls._from_config(config, dtype=run_dtype(adapter, name))
        encoder.tie_weights()  # moving parameters to meta one by one has parted them
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: config.json describes no {cls.__name__} ({error}). {COPY_AGAIN}") from error
    built: nn.Module = encoder.eval().requires_grad_(False)
    return built


def run_dtype(adapter: ModelAdapter, name: str) -> torch.dtype:
    """The type in which a part is loaded."""
    return DTYPES[adapter.component_dtypes.get(name, adapter.dtype)]


def map_encoder(adapter: ModelAdapter, name: str) -> tuple[nn.Module, dict[str, torch.dtype]]:
    """A text encoder on the tensors of its files, in the types that they have there; and, by name, the types in which
    they run where those are others.

    transformers itself says which tensor goes where: it renames, merges and ties some of them. What it does not take
    as it is stored (merged tensors, files with several types) is in memory; the rest is read when it is looked at.
    Raises UserError for files that are missing, damaged, or of another model.
    """
    cls, folder = models_of(adapter.index())[name], adapter.part_folder(name, weights=True)
    variant = variant_of(folder, adapter.variant)
    check_part(cls, folder, adapter.variant, lenient=False)
    tensors = _mapped(weight_files(folder, TRANSFORMERS, variant))
    stored = _common(tensors)
    encoder = _loaded(_uncast(cls), folder, tensors, stored)
    encoder.__class__ = cls
    hollow = {key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()}
    runs = _loaded(cls, folder, hollow, run_dtype(adapter, name), device_map="meta").state_dict()
    found = {key: runs[key].dtype for key, tensor in encoder.state_dict().items() if runs[key].dtype != tensor.dtype}
    return encoder.eval().requires_grad_(False), found


def load_text_from_disk(adapter: ModelAdapter) -> Any:
    """`adapter.load_text_part()` whose encoders leave their weights in their files; embeddings are equal to the bit."""
    check_contents(adapter)
    return adapter.load_text_part(encoders_on_disk(adapter))


def encoders_on_disk(adapter: ModelAdapter, but: Collection[str] = ()) -> dict[str, nn.Module]:
    """The float text encoders by name (those of transformers, without `but`), whose layers have their weights while
    they compute. Raises UserError for damaged files, and for numbers that are not finite."""
    found = {}
    for name, cls in models_of(adapter.index()).items():
        if name.startswith(ENCODER) and name not in but and issubclass(cls, transformers.PreTrainedModel):
            encoder, runs = map_encoder(adapter, name)
            check_finite(name, adapter.folder, encoder, runs)
            leave_on_disk(encoder, runs, hide=True)
            found[name] = encoder
    return found


def _mapped(files: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            if path.suffix == ".safetensors":
                tensors |= mapped_tensors(path)
            else:
                tensors |= torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except DAMAGED as error:
            raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}). {COPY_AGAIN}") from error
    return tensors


def _common(tensors: dict[str, Tensor]) -> torch.dtype:
    """The type that most of the numbers are stored in."""
    counts: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype])


def _uncast(cls: Any) -> Any:
    """The class without its wish for float32 in some layers, which would copy those that are stored in float16."""
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "_get_dtype_plan": lambda self, dtype: {}})


def _loaded(cls: Any, folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype, **where: Any) -> nn.Module:
    config = cls.config_class.from_pretrained(folder)
    try:
        loaded: nn.Module = cls.from_pretrained(None, config=config, state_dict={**tensors}, dtype=dtype, **where)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} cannot be loaded as {cls.__name__} ({error}). {COPY_AGAIN}") from error
    return loaded
