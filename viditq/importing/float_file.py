"""Float weights of a denoiser in one file, as its original release has them, become a folder of diffusers' layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from viditq.errors import UserError
from viditq.export.comfy_file import LAYERS, MARKER
from viditq.export.release_extras import left_out_of
from viditq.files import read_json, stored_metadata
from viditq.importing.comfy_file import mapped, origins_of, parts_of, without_prefix
from viditq.importing.denoiser import FLOATS, ImportedDenoiser, check_names
from viditq.models.adapter import ModelAdapter
from viditq.models.dtypes import DTYPES
from viditq.quant.artifact import file_sha256
from viditq.work_folder import end, held, resume, work_folder

INDEX = ".safetensors.index.json"
SHARD = "1GB"


def holds_floats(path: Path) -> bool:
    """Whether a file (or the index of several) has float weights alone, and nothing that says what codes stand for.

    Raises UserError where it is damaged.
    """
    if path.is_dir() or not path.name.endswith((".safetensors", INDEX)):
        return False
    if not path.name.endswith(INDEX) and LAYERS in stored_metadata(path):
        return False
    tensors = _tensors(path)
    return all(tensor.dtype in FLOATS and not name.endswith(f".{MARKER}") for name, tensor in tensors.items())


def write_float(adapter: ModelAdapter, paths: Sequence[Path], out: Path) -> list[str]:
    """Write a folder for each denoiser, in the types of the files; it appears when all is written.

    Returns the names in the files that are no part of a denoiser. Raises UserError where a file is not the model's, or
    `out` or the folder in which it grows holds anything else.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already. Delete it, or give another --out.")
    denoiser, left_out = adapter.build_denoiser(), list[str]()
    parts = dict(denoiser) if isinstance(denoiser, nn.ModuleDict) else {adapter.denoiser_names[0]: denoiser}
    found = {name: _read(path, parts[name]) for name, path in zip(parts, paths, strict=True)}
    for name, part in parts.items():
        found[name].put_into(part, DTYPES[adapter.component_dtypes.get(name, adapter.dtype)])
        left_out += found[name].left_out
    work = work_folder(out)
    with held(work):
        resume(work, {name: file_sha256(path) for name, path in zip(parts, paths, strict=True)})
        for name, part in parts.items():
            part.save_pretrained(work / name, max_shard_size=SHARD)  # type: ignore[operator]
        end(work)
        work.replace(out)  # an empty folder may be there
    return left_out


def _read(path: Path, denoiser: nn.Module) -> ImportedDenoiser:
    tensors, left_out = without_prefix(_tensors(path))
    kind = type(denoiser).__name__
    own = all(name in tensors for name in denoiser.state_dict())  # diffusers' names
    origins = origins_of(denoiser, {name.rpartition(".")[0] for name in tensors} if own else set())
    extras = [name for name in tensors if name in left_out_of(kind)]
    check_names([name for name in tensors if name not in extras], [*origins], f"{kind} of its original release")
    floats: dict[str, Tensor] = {}
    for name, origin in origins.items():
        floats |= parts_of(tensors[name], origin, denoiser)
    return ImportedDenoiser("its original release", {}, floats, [*left_out, *extras])


def _tensors(path: Path) -> dict[str, Tensor]:
    """Of a file, or of all that an index names."""
    if not path.name.endswith(INDEX):
        return mapped(path)
    index = read_json(path, "Download it again.")
    files = sorted({*index.get("weight_map", {}).values()}) if isinstance(index, dict) else []
    if not files:
        raise UserError(f"{path} names no files (weight_map). Download it again.")
    if missing := [file for file in files if not (path.parent / str(file)).is_file()]:
        raise UserError(f"{path.parent / missing[0]} is missing, which {path.name} names. Download it.")
    return {name: tensor for file in files for name, tensor in mapped(path.parent / str(file)).items()}
