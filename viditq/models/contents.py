"""Every part of a pipeline held against its files, by the names and shapes that they say, before anything is loaded.

The libraries fill what is missing with random numbers and drop what is left over. Here both are refused; what a
library itself declares ignorable stays so.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from viditq.assets import index_name
from viditq.errors import UserError
from viditq.files import read_mapping
from viditq.mapped import is_finite
from viditq.models.mismatch import Mismatch
from viditq.models.modular import MADE
from viditq.models.parts import models_of, part_class
from viditq.models.weight_files import (
    COPY_AGAIN,
    DIFFUSERS,
    FLOAT8,
    TRANSFORMERS,
    other_variants,
    stored_tensors,
    variant_of,
    weight_files,
)
from viditq.on_disk import is_stand_in

PLAIN = (nn.Parameter, Tensor)  # other kinds are what a library has quantized
HEADS = ("lm_head.",)  # of a language model whose trunk alone encodes text


class Described(Protocol):
    """What is asked of a ModelAdapter."""

    @property
    def call(self) -> Mapping[str, Any]:
        """Arguments of the pipeline's call."""

    @property
    def variant(self) -> str | None:
        """The mark of the weights' files."""

    @property
    def folder(self) -> Path:
        """The pipeline's folder."""

    def index(self) -> dict[str, Any]:
        """The content of model_index.json."""

    def part_folder(self, name: str, weights: bool) -> Path:
        """The folder of one part."""


def check_contents(adapter: Described, without: Collection[str] = (), lenient: bool = False) -> None:
    """Hold every part of the pipeline against its files but those in `without`; raises UserError for one that differs.

    lenient: weights may be absent altogether, as those of a model on the hub that is not downloaded yet.
    """
    entries = {name: entry for name, entry in adapter.index().items() if isinstance(entry, list)}
    own_scheduler = adapter.call.get("sampler") is not None
    if not own_scheduler and entries.get("scheduler", [None])[0] is None:
        raise UserError(f"{index_name(adapter.folder)} of {adapter.folder} names no scheduler. {COPY_AGAIN}")
    made = adapter.index().get(MADE, ())
    for name, (library, class_name) in entries.items():
        if library is None or name in without or name in made or (name == "scheduler" and own_scheduler):
            continue
        cls = part_class([library, class_name])
        if cls is not None:
            check_part(cls, adapter.part_folder(name, weights=not lenient), adapter.variant, lenient)
        elif library in ("diffusers", "transformers"):
            raise UserError(
                f"{index_name(adapter.folder)} of {adapter.folder} names {class_name} as {name}; the installed "
                f"{library} has no such class. Install a version that has it."
            )
    if adapter.variant and not lenient:
        _check_variant(adapter)


def _check_variant(adapter: Described) -> None:
    folders = [adapter.part_folder(name, weights=False) for name in models_of(adapter.index())]
    bare = [path for folder in folders if folder.is_dir() for path in folder.iterdir() if "." not in path.name]
    if bare:  # diffusers cuts names at the dots without looking whether there are any
        raise UserError(
            f"model.variant={adapter.variant!r}: diffusers cannot look for it beside {bare[0]}, whose name has no dot. "
            "Move that file out of the model's folder."
        )
    if not parts_by_variant(adapter)[0]:
        raise UserError(
            f"model.variant={adapter.variant!r}: {adapter.folder} has no file of it, such as "
            f"diffusion_pytorch_model.{adapter.variant}.safetensors. Leave it out, or give what stands in the names."
        )


def parts_by_variant(adapter: Described) -> tuple[list[str], list[str]]:
    """The parts whose weights are read from files of the variant, and those that have no such files."""
    models = models_of(adapter.index())
    taken = [name for name in models if variant_of(adapter.part_folder(name, weights=False), adapter.variant)]
    return taken, [name for name in models if name not in taken]


def check_part(cls: Any, folder: Path, variant: str | None, lenient: bool) -> None:
    """Raises UserError unless `folder` holds what a part of class `cls` is made of, and nothing else."""
    if not folder.is_dir():
        raise UserError(f"{folder} is missing, a part that {index_name(folder.parent)} names. {COPY_AGAIN}")
    if issubclass(cls, transformers.PreTrainedTokenizerBase):
        _check_vocabulary(cls, folder)
    elif issubclass(cls, nn.Module):
        stats = {path.name: path.stat() for path in folder.iterdir() if path.is_file()}
        stamp = tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()))
        _check_model(cls, folder, variant_of(folder, variant), lenient, stamp)
    elif not [*folder.glob("*.json")]:
        raise UserError(f"{folder} holds no configuration (*.json). {COPY_AGAIN}")


def _check_vocabulary(cls: Any, folder: Path) -> None:
    """transformers makes an empty tokenizer where it finds no vocabulary, and words become unknown letters."""
    apart = {**cls.vocab_files_names}
    whole = apart.pop("tokenizer_file", "tokenizer.json")
    found = (folder / whole).is_file() or [*folder.glob("*.model")]
    if cls.vocab_files_names and not found and not (apart and all((folder / n).is_file() for n in apart.values())):
        raise UserError(f"{folder} holds no vocabulary: {' or '.join([whole, *apart.values()])}. {COPY_AGAIN}")


@cache
def _check_model(cls: Any, folder: Path, variant: str | None, lenient: bool, stamp: tuple[Any, ...]) -> None:
    """stamp: names, sizes and times of the folder's files; where they changed it is looked at anew."""
    config = read_mapping(folder / "config.json", remedy=COPY_AGAIN)
    _check_float(folder, config)
    of_transformers = issubclass(cls, transformers.PreTrainedModel)
    names = TRANSFORMERS if of_transformers else DIFFUSERS
    files = weight_files(folder, names, variant)
    if not files:
        if variants := other_variants(folder, names):
            raise UserError(
                f"{folder} holds weights of the variant {' and '.join(variants)} alone: give "
                f"+model.variant={variants[0]}."
            )
        if lenient:
            return
        raise UserError(f"{folder} holds no weights: {' or '.join(names)} is missing. {COPY_AGAIN}")
    tensors = stored_tensors(files)
    try:
        held = (_held_by_transformers if of_transformers else _held_by_diffusers)(cls, folder, config, tensors, files)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder}: config.json describes no {cls.__name__} ({type(error).__name__}: {error}). {COPY_AGAIN}"
        ) from error
    if held:
        raise UserError(f"{folder} is not what {cls.__name__} is made of: {held.told()}")
    _check_scales(folder, files, tensors)


def _check_float(folder: Path, config: Mapping[str, Any]) -> None:
    if stored := config.get("quantization_config"):
        method = stored.get("quant_method") or stored.get("quant_type") or "an unnamed method"
        raise UserError(
            f"{folder} was stored quantized (quantization_config of its config.json: {method}). viditq quantizes and "
            "compares float weights: take the float checkpoint (bfloat16, float16 or float32)."
        )


def _held_by_diffusers(
    cls: Any, folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor], files: list[Path]
) -> Mismatch:
    with init_empty_weights(include_buffers=False):
        model = cls.from_config(config)
    if len(files) == 1 and hasattr(model, "_fix_state_dict_keys_on_load"):  # as diffusers does, for old names
        model._fix_state_dict_keys_on_load(tensors)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ignored = model._keys_to_ignore_on_load_unexpected or []
    computed = {name for name, _ in model.named_buffers()}  # those that are stored no more are made anew
    odd = tensors.keys() - wanted.keys() - computed
    return Mismatch(
        missing=wanted.keys() - tensors.keys(),
        left_over={name for name in odd if not any(re.search(pattern, name) for pattern in ignored)},
        shapes={n: (tuple(t.shape), wanted[n]) for n, t in tensors.items() if wanted.get(n, t.shape) != tuple(t.shape)},
        integers=_integers(tensors),
        known=wanted.keys(),
    )


def _held_by_transformers(
    cls: Any, folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor], files: list[Path]
) -> Mismatch:
    """By the library's own load on the meta device, since it renames, merges and ties tensors on the way."""
    model, info = cls.from_pretrained(
        None,
        config=cls.config_class.from_pretrained(folder),
        state_dict={**tensors},
        device_map="meta",
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    return Mismatch(
        missing=info["missing_keys"],
        left_over={name for name in info["unexpected_keys"] if not name.startswith(HEADS)},
        shapes={name: (tuple(stored), tuple(needed)) for name, stored, needed in sorted(info["mismatched_keys"])},
        integers=_integers(tensors),
        known=model.state_dict().keys(),
    )


def _integers(tensors: Mapping[str, Tensor]) -> set[str]:
    weights = {name: tensor for name, tensor in tensors.items() if name.endswith((".weight", ".bias"))}
    return {name for name, tensor in weights.items() if not tensor.dtype.is_floating_point}


def _check_scales(folder: Path, files: list[Path], tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError for 8-bit weights whose scales lie in a file of their own, which no library reads."""
    eight = sorted(name for name, tensor in tensors.items() if tensor.dtype in FLOAT8)
    others = [path for path in folder.glob("*.safetensors") if path not in files] if eight else []
    for path in others:
        if any("scale" in name.lower() for name in stored_tensors([path])):
            raise UserError(
                f"{folder}: {len(eight)} weights are stored in 8 bits, first {eight[0]}, and their scales apart in "
                f"{path.name}, where they are not applied. Take the float checkpoint (bfloat16, float16 or float32)."
            )


def check_finite(part: str, folder: Path, module: nn.Module, runs: Mapping[str, torch.dtype] | None = None) -> None:
    """Raises UserError for NaN or infinity among the weights of a part that was loaded.

    runs: types of those that compute in another than they have. What stands in for a weight in its file was checked
    before.
    """
    for name, parameter in module.named_parameters():
        run = (runs or {}).get(name, parameter.dtype)
        if type(parameter) in PLAIN and not is_stand_in(parameter) and not is_finite(parameter.detach(), run):
            dtype = str(run).removeprefix("torch.")
            remedy = "A wider type does not help: the numbers are stored so. Copy the model's folder again."
            if run == torch.float16:  # the one type with a smaller range than those stored in
                key = f"model.dtype (or model.component_dtypes.{part})"
                remedy = f"Or, if it was stored in a type of wider range, load it so: {key}=bfloat16 or float32."
            raise UserError(f"{part}.{name} of {folder} contains NaN or inf as {dtype}. Check the checkpoint. {remedy}")
