"""Which files of a part's folder its library reads, and the tensors that they say they hold; no values are read."""

import pickle
import struct
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.files import read_json, stored_entries
from viditq.mapped import DTYPES as STORED_DTYPES

COPY_AGAIN = "Copy the model's folder again."
# In the order in which each library looks for them.
DIFFUSERS = (
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
)
TRANSFORMERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
DAMAGED = (OSError, ValueError, KeyError, RuntimeError, EOFError, struct.error, pickle.UnpicklingError)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def variant_of(folder: Path, variant: str | None) -> str | None:
    """`variant` if diffusers takes it for this part: one that has no file of it is read without."""
    marked = [path.name.split(".")[1:2] for path in folder.iterdir()] if folder.is_dir() else []
    return variant if variant and any(mark and mark[0].startswith(variant) for mark in marked) else None


def weight_files(folder: Path, names: Iterable[str], variant: str | None) -> list[Path]:
    """The files that hold a part's weights, all shards of one; empty where there are none.

    names: DIFFUSERS or TRANSFORMERS. Raises UserError for an index that names a file which is not there.
    """
    found = [folder / _with_variant(name, variant) for name in names]
    first = next((path for path in found if path.is_file()), None)
    if first is None or first.suffix != ".json":
        return [] if first is None else [first]
    shards = [folder / name for name in sorted(set(read_json(first, COPY_AGAIN).get("weight_map", {}).values()))]
    for shard in shards:
        if not shard.is_file():
            raise UserError(f"{shard} is missing, which {first.name} names. {COPY_AGAIN}")
    return shards


def other_variants(folder: Path, names: Iterable[str]) -> list[str]:
    """The variants whose weights a folder holds, such as fp16."""
    stems = [
        name.removesuffix(suffix) for name in names for suffix in (".safetensors", ".index.json") if suffix in name
    ]
    marks = {path.name.removeprefix(stem)[1:].split(".")[0] for stem in stems for path in folder.glob(f"{stem}.*.*")}
    return sorted(mark.split("-")[0] for mark in marks - {"safetensors", "index"})


def _with_variant(name: str, variant: str | None) -> str:
    stem, suffix = name.rsplit(".", 1)
    return f"{stem}.{variant}.{suffix}" if variant else name


def stored_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """Name -> a tensor on the meta device of the stored shape and dtype; raises UserError for a damaged file."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            tensors |= _of_safetensors(path) if path.suffix == ".safetensors" else _of_bin(path)
        except DAMAGED as error:
            raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}). {COPY_AGAIN}") from error
    return tensors


def _of_safetensors(path: Path) -> dict[str, Tensor]:
    return {
        name: torch.empty(entry["shape"], dtype=STORED_DTYPES.get(entry["dtype"], torch.uint8), device="meta")
        for name, entry in stored_entries(path).items()
    }


def _of_bin(path: Path) -> dict[str, Tensor]:
    loaded = torch.load(path, map_location="meta", weights_only=True)
    return {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
