"""From a quantized pipeline's folder in diffusers' layout to a pipeline, as `viditq.load_quantized` gives it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from torch import nn

from viditq.errors import UserError
from viditq.files import read_json
from viditq.fusion.install import fuse_blocks
from viditq.interop.folder import INDEX, REMEDY, QuantizedParts, quantized_parts, read_description
from viditq.models.adapter import ModelAdapter
from viditq.models.dtypes import DTYPES
from viditq.models.generate import DtypeBoundary, with_settings
from viditq.models.registry import find_class
from viditq.models.text_encoders import encoders_on_disk
from viditq.quant.execution.denoiser import refuse_to_save


def load_exported(folder: Path, backend: str, memory_budget: int | None) -> Any:
    """The whole pipeline; with the model's settings as defaults of its call where the folder tells them.

    Raises UserError for files that are missing, damaged or of another version.
    """
    description = read_description(folder)
    names = quantized_parts(folder)
    parts = QuantizedParts.of_folder(folder, names)
    if description is None:
        denoiser = parts.fill(_build(folder, names), backend, memory_budget)
        dtype = DTYPES[parts.dtype or "float32"]
    else:
        adapter = ModelAdapter.from_dict(description | {"path": str(folder)})
        denoiser = parts.fill(adapter.build_denoiser(), backend, memory_budget)
        dtype = adapter.torch_dtype
    denoiser.eval().requires_grad_(False)
    fuse_blocks(denoiser)
    if parts.float_dtype not in (None, parts.dtype):
        DtypeBoundary(denoiser, DTYPES[parts.float_dtype], dtype, parts.timestep_argument)
    if description is None:
        found = dict(denoiser) if isinstance(denoiser, nn.ModuleDict) else {names[0]: denoiser}
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True, **found)
    else:
        encoders = {} if memory_budget is None else encoders_on_disk(adapter)
        pipeline = with_settings(adapter, adapter.load_complete(denoiser, encoders))
    pipeline.save_pretrained = partial(refuse_to_save, f"a copy of {folder}, and viditq.load_quantized(copy)")
    return pipeline


def _build(folder: Path, names: list[str]) -> nn.Module:
    """The structure of the denoisers: parameters on the meta device, buffers real."""
    index, parts = read_json(folder / INDEX, REMEDY), dict[str, nn.Module]()
    for name in names:
        cls = find_class(index[name][1])
        if cls is None:
            raise UserError(f"{folder / INDEX} names {index[name][1]} as {name}, which the installed diffusers lacks.")
        with init_empty_weights(include_buffers=False):
            parts[name] = cls.from_config(read_json(folder / name / "config.json", REMEDY))
    return nn.ModuleDict(parts) if len(parts) > 1 else parts[names[0]]
