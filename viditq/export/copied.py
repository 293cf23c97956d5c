"""A part of a pipeline that is not quantized: its descriptions, and the files of weights that its library reads."""

from __future__ import annotations

import shutil
from pathlib import Path

from viditq.files import atomic, read_json, write_json
from viditq.models.weight_files import DIFFUSERS, TRANSFORMERS, variant_of, weight_files

# Endings of weights; those of other libraries, and other precisions, are left out.
WEIGHTS = (
    ".safetensors",
    ".bin",
    ".msgpack",
    ".h5",
    ".onnx",
    ".onnx_data",
    ".ckpt",
    ".pt",
    ".pth",
    ".gguf",
    ".index.json",
)


def copy_part(source: Path, target: Path, variant: str | None, dtype: str) -> None:
    """Copy what is not there yet.

    variant: the mark of the files that are read, which their copies do not have. dtype: in which it runs, which
    transformers takes from its config.json where a pipeline is loaded without one.
    """
    mark = variant_of(source, variant)
    kinds = (DIFFUSERS, TRANSFORMERS)
    read = next(filter(None, (weight_files(source, names, mark) for names in kinds)), [])
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        if path in read or not path.name.endswith(WEIGHTS):
            _copy(path, target / _unmarked(str(path.relative_to(source)), mark))
    if len(read) > 1:
        names = next(n for n in kinds if weight_files(source, n, mark))
        index = next(p for n in names if n.endswith(".index.json") for p in source.glob(_marked_index(n, mark)))
        values = read_json(index)
        values["weight_map"] = {tensor: _unmarked(file, mark) for tensor, file in values["weight_map"].items()}
        write_json(target / _unmarked(index.name, mark), values)
    config = target / "config.json"
    if config.is_file() and "model_type" in (values := read_json(config)):
        write_json(config, {name: value for name, value in values.items() if name != "torch_dtype"} | {"dtype": dtype})


def _marked_index(name: str, mark: str | None) -> str:
    stem, suffix = name.rsplit(".", 1)
    return f"{stem}.{mark}.{suffix}" if mark else name


def _unmarked(name: str, mark: str | None) -> str:
    """diffusion_pytorch_model.fp16-00001-of-00002.safetensors -> diffusion_pytorch_model-00001-of-00002.safetensors."""
    return name.replace(f".{mark}.", ".").replace(f".{mark}-", "-") if mark else name


def _copy(source: Path, target: Path) -> None:
    if not (target.is_file() and target.stat().st_size == source.stat().st_size):
        with atomic(target) as temporary:
            shutil.copyfile(source, temporary)
