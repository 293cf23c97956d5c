"""Float weights of a denoiser in one file, as its original release has them, become a folder of diffusers' layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.export.comfy_formats import Marker
from viditq.export.part import Entry
from viditq.export.part_files import write_files
from viditq.files import read_json
from viditq.importing.comfy_file import mapped, markers_of
from viditq.importing.denoiser import FLOATS, check_float
from viditq.importing.float8 import FLOAT8, FORMATS, made, scales_of
from viditq.importing.origins import origins_of, rows_of, without_prefix
from viditq.models.adapter import ModelAdapter
from viditq.models.dtypes import DTYPES
from viditq.models.weight_files import COPY_AGAIN
from viditq.quant.artifact import file_sha256
from viditq.work_folder import end, held, resume, work_folder

INDEX = ".safetensors.index.json"


def holds_floats(path: Path) -> bool:
    """Whether a file (or the index of several) has float weights alone, 8-bit ones included, and no integer codes.

    Raises UserError where it is damaged.
    """
    if path.is_dir() or not path.name.endswith((".safetensors", INDEX)):
        return False
    tensors, markers, _ = _read(path)
    if any(marker.get("format") not in FORMATS for marker in markers.values()):
        return False
    beside = scales_of(tensors, markers).beside
    return all(tensor.dtype in (*FLOATS, *FLOAT8) for name, tensor in tensors.items() if name not in beside)


def write_float(adapter: ModelAdapter, paths: Sequence[Path], out: Path) -> list[str]:
    """Write a folder for each denoiser, a tensor at a time, in the types of the files; it appears when all is written.

    8-bit floating-point weights are written in the model's type. Returns what is to be told of them, and of names in
    the files that are no part of a denoiser. Raises UserError where a file is not the model's, or `out` or the folder
    in which it grows holds anything else.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already. Delete it, or give another --out.")
    denoiser, told = adapter.build_denoiser(), list[str]()
    parts = dict(denoiser) if isinstance(denoiser, nn.ModuleDict) else {adapter.denoiser_names[0]: denoiser}
    found: dict[str, list[Entry]] = {}
    for (name, part), path in zip(parts.items(), paths, strict=True):
        found[name], lines = _entries(path, part, DTYPES[adapter.component_dtypes.get(name, adapter.dtype)])
        told += lines
    work = work_folder(out)
    with held(work):
        dtypes = [sorted({str(entry.dtype) for entry in entries}) for entries in found.values()]
        files = [file_sha256(file) for path in paths for file in _files(path)]
        resume(work, {"files": files, "dtypes": dtypes})
        for name, entries in found.items():
            config = read_json(adapter.part_folder(name, weights=False) / "config.json", COPY_AGAIN)
            write_files(work / name, config, entries)
        end(work)
        work.replace(out)  # an empty folder may be there
    return told


def _entries(path: Path, denoiser: nn.Module, dtype: torch.dtype) -> tuple[list[Entry], list[str]]:
    """All tensors of a denoiser, and what is to be told of the file. dtype: of what is made of 8-bit numbers."""
    tensors, markers, left_out = _read(path)
    scales = scales_of(tensors, markers)
    weights = {name: tensor for name, tensor in tensors.items() if name not in scales.beside}
    origins, extras = origins_of(denoiser, weights, "its original release")
    wanted, entries = denoiser.state_dict(), list[Entry]()
    for source, origin in origins.items():
        tensor, scale = weights[source], scales.of.get(source)
        exact = scale is None and tensor.dtype not in FLOAT8
        type_ = tensor.dtype if exact else dtype
        for name, rows in rows_of(tensor, origin, denoiser).items():
            shape = tuple(rows.of(tensor.to("meta")).shape)
            check_float(name, type_, shape, wanted[name].shape)
            make = partial(rows.of, tensor) if exact else partial(made, tensor, rows, scale, dtype)
            entries.append(Entry(name, type_, shape, make))
    return entries, [*_of_float8(weights, scales.of, dtype), *_of_left_out([*left_out, *extras])]


def _of_float8(weights: Mapping[str, Tensor], scales: Mapping[str, Tensor], dtype: torch.dtype) -> list[str]:
    plain = sum(tensor.dtype in FLOAT8 for name, tensor in weights.items() if name not in scales)
    counts = {"times their scales": len(scales), "as they are, for the file has no scales of them": plain}
    kind = str(dtype).removeprefix("torch.")
    return [f"{n} tensors of 8-bit floating point {how}, as {kind}" for how, n in counts.items() if n]


def _of_left_out(names: Sequence[str]) -> list[str]:
    return [f"{len(names)} tensors that are no part of it, such as {names[0]}"] if names else []


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Marker], list[str]]:
    """Of a file, or of all that an index names: the denoiser's tensors, formats of its layers, names of the rest."""
    files = _files(path)
    tensors, left_out = without_prefix({name: tensor for file in files for name, tensor in mapped(file).items()})
    return tensors, markers_of(files, tensors), left_out


def _files(path: Path) -> list[Path]:
    if not path.name.endswith(INDEX):
        return [path]
    index = read_json(path, "Download it again.")
    files = sorted({*index.get("weight_map", {}).values()}) if isinstance(index, dict) else []
    if not files:
        raise UserError(f"{path} names no files (weight_map). Download it again.")
    if missing := [file for file in files if not (path.parent / str(file)).is_file()]:
        raise UserError(f"{path.parent / missing[0]} is missing, which {path.name} names. Download it.")
    return [path.parent / str(file) for file in files]
