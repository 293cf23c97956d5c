"""From another program's codes to an artifact, one Linear at a time, as quantizing writes one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from viditq.errors import UserError
from viditq.files import is_whole, read_json
from viditq.importing.comfy_file import read_comfy
from viditq.importing.conversion import ImportedConversion
from viditq.importing.denoiser import ImportedDenoiser
from viditq.importing.layer import ImportedLayer
from viditq.importing.torchao_folder import read_torchao
from viditq.models.adapter import ModelAdapter
from viditq.models.dtypes import DTYPES
from viditq.quant.artifact import META, file_sha256
from viditq.quant.convert import convert_in_place
from viditq.quant.streaming import quantize_to
from viditq.report.model_card import recipe_words


class ImportedModel:
    """All denoisers of a pipeline, on the tensors of files of another program, of which only headers are read.

    paths: one for each of adapter.denoisers, in their order: a ComfyUI file, or the folder of a denoiser that diffusers
    saved with torchao (or of a pipeline that has one of that name). Raises UserError for what is not exactly a scheme.
    """

    def __init__(self, adapter: ModelAdapter, paths: Sequence[Path]) -> None:
        self.adapter, self.paths = adapter, places(adapter, paths)
        self.denoiser: nn.Module = adapter.build_denoiser()
        names = adapter.denoiser_names
        parts = dict(self.denoiser) if isinstance(self.denoiser, nn.ModuleDict) else {names[0]: self.denoiser}
        self.layers: dict[str, ImportedLayer] = {}
        self.left_out: list[str] = []
        self.runs: dict[str, torch.dtype] = {}
        for (name, part), path in zip(parts.items(), self.paths, strict=True):
            prefix = f"{name}." if len(parts) > 1 else ""
            found = _read(path, part)
            self.program = found.program
            dtype = DTYPES[adapter.component_dtypes.get(name, adapter.dtype)]
            self.runs |= {f"{prefix}{n}": runs for n, runs in found.put_into(part, dtype).items()}
            self.layers |= {f"{prefix}{n}": layer for n, layer in found.layers.items()}
            self.left_out += found.left_out
        self.denoiser.eval().requires_grad_(False)
        self.plan = self._conversion().plan

    def told(self) -> str:
        """What is read: layers by format, and what of the files is left out."""
        lines = recipe_words(json.loads(self.plan.to_json()))
        said = f"of {self.program}: {', '.join(lines)}; all else in float"
        count = len(self.left_out)
        return f"{said}; {count} tensors that are no part of it, such as {self.left_out[0]}" if count else said

    def write(self, folder: Path) -> None:
        """The artifact; a killed call goes on where it was. Raises UserError for NaN or inf, and for a full disk."""
        if is_there(folder, self.source):
            return
        quantize_to(folder, self._conversion(), self.runs, self._meta())

    def fill(self, backend: str) -> nn.Module:
        """The denoiser itself, with QuantLinears in memory; it can be used, and this object cannot any more."""
        conversion = self._conversion(backend)
        for name, tensor in self.denoiser.state_dict(keep_vars=True).items():
            if name in self.runs and not tensor.is_meta:
                tensor.data = tensor.data.to(self.runs[name])
        convert_in_place(conversion)
        return self.denoiser

    def _conversion(self, backend: str = "fake") -> ImportedConversion:
        return ImportedConversion(self.denoiser, self.layers, self.runs, self.adapter.timestep_scale, backend)

    @cached_property
    def source(self) -> dict[str, Any]:
        """Where it is from, for meta.json."""
        files = {path.name: path for path in self.paths if path.is_file()}
        for folder in (path for path in self.paths if path.is_dir()):
            files |= {f"{folder.name}/{file.name}": file for file in sorted(folder.glob("*.safetensors"))}
        return {"program": self.program, "files": {name: file_sha256(path) for name, path in files.items()}}

    def _meta(self) -> dict[str, Any]:
        linears = {n: m for n, m in self.denoiser.named_modules() if isinstance(m, nn.Linear)}
        floats = self.adapter.left_in_float_bytes()
        in_features = {name: linear.in_features for name, linear in linears.items()}
        numel = {name: linear.in_features * linear.out_features for name, linear in linears.items()}
        return {
            "model": self.adapter.to_dict(),
            "weights": None,
            "float_dtype": None,
            "average_weight_bits": self.plan.average_weight_bits(numel),
            "average_activation_bits": self.plan.average_activation_bits(in_features),
            "float_size_bytes": sum(2 * p.numel() for p in self.denoiser.parameters()) + floats,
            "left_in_float_bytes": floats,
            "stats": None,
            "imported": self.source,
        }


def is_there(folder: Path, source: Mapping[str, Any]) -> bool:
    """Whether this very import is there; UserError where something else is."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    meta = folder / META
    if is_whole(meta) and read_json(meta).get("imported") == dict(source):
        return True
    raise UserError(f"{folder} is there already and is no import of this file. Delete it, or give another --out.")


def places(adapter: ModelAdapter, paths: Sequence[Path]) -> list[Path]:
    """The file or the denoiser's folder that is meant by each; raises UserError unless each denoiser has one."""
    names = adapter.denoiser_names
    if len(paths) != len(names):
        raise UserError(
            f"{adapter.name} has {len(names)} denoisers ({', '.join(names)}), and {len(paths)} files were given: "
            "give one for each, in this order"
        )
    return [_place(path, name) for path, name in zip(paths, names, strict=True)]


def _place(path: Path, name: str) -> Path:
    """The file, or the denoiser's folder."""
    if path.is_dir():
        if (path / META).is_file() or (path / "quantized").is_dir():
            raise UserError(f"{path} is an artifact of viditq already: load it with viditq.load_quantized.")
        place = path / name if (path / name / "config.json").is_file() else path
        if not (place / "config.json").is_file():
            raise UserError(
                f"{path} is no denoiser's folder as diffusers saves it (config.json is missing). Of a ComfyUI model "
                "give the file itself."
            )
        return place
    if not path.is_file():
        raise UserError(
            f"{path} does not exist. Give a file or folder here; of the hub: `hf download USER/NAME` first."
        )
    if not path.name.endswith((".safetensors", ".safetensors.index.json")):
        raise UserError(f"{path} is no safetensors file. Imported are ComfyUI's files and folders saved with torchao.")
    return path


def _read(path: Path, denoiser: nn.Module) -> ImportedDenoiser:
    return read_torchao(path, denoiser) if path.is_dir() else read_comfy(path, denoiser)
