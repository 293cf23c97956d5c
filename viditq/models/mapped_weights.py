"""The denoisers of a pipeline on the tensors of their files, none of which is read before it is looked at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.mapped import mapped_tensors
from viditq.models.contents import check_contents
from viditq.models.dtypes import DTYPES
from viditq.models.weight_files import COPY_AGAIN, DAMAGED, DIFFUSERS, variant_of, weight_files
from viditq.on_disk import leave_on_disk


def map_weights(model: nn.Module, folder: Path, variant: str | None, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Give a diffusers model, whose parameters are on meta, the tensors of its files, in the types that they have
    there; returns, by name, the types in which they run where those are others (`run_dtypes`).

    Raises UserError for files that are missing or damaged; names are held against the model by `check_contents` before.
    """
    tensors = stored_state(model, folder, variant)
    model.load_state_dict(tensors, assign=True)
    return run_dtypes(model, tensors, dtype)


def stored_state(model: nn.Module, folder: Path, variant: str | None) -> dict[str, Tensor]:
    """The tensors of a diffusers model's files under the names of `model`; those that it has no place for left out."""
    files = weight_files(folder, DIFFUSERS, variant_of(folder, variant))
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            tensors |= _of_file(path)
        except DAMAGED as error:
            raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}). {COPY_AGAIN}") from error
    old: Any = model  # of a class of diffusers
    if len(files) == 1 and hasattr(old, "_fix_state_dict_keys_on_load"):  # as diffusers does, for old names
        old._fix_state_dict_keys_on_load(tensors)
    return {name: tensors[name] for name in model.state_dict() if name in tensors}


def _of_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return mapped_tensors(path)
    loaded: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return loaded


def run_dtypes(model: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Name -> type, as diffusers' from_pretrained casts them, of the tensors that are stored in another."""
    wide = model._keep_in_fp32_modules or []
    wide = wide if isinstance(wide, list) else [wide]
    floats = {name: tensor.dtype for name, tensor in tensors.items() if tensor.is_floating_point()}
    runs = {name: torch.float32 if {*name.split(".")} & {*wide} else dtype for name in floats}
    return {name: runs_in for name, runs_in in runs.items() if runs_in != floats[name]}


def retyped(denoiser: nn.Module, runs: Mapping[str, torch.dtype], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """`runs` of a denoiser that is cast to `dtype` after it was loaded. What it loses on the way it loses here."""
    found = {}
    for name, tensor in denoiser.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            loaded = runs.get(name, tensor.dtype)
            if loaded not in (tensor.dtype, dtype) and loaded.itemsize <= tensor.itemsize:
                tensor.data = tensor.data.to(loaded)
            if dtype != tensor.dtype:
                found[name] = dtype
    return found


def map_denoiser(adapter: Any) -> tuple[nn.Module, dict[str, torch.dtype]]:
    """`denoiser_of` the loaded pipeline, its tensors left in their files in the types that they have there; and, by
    name, the types in which they run where those are others.
    """
    others = [name for name in adapter.components if name not in adapter.denoiser_names]
    check_contents(adapter, without=others)
    denoiser: nn.Module = adapter.build_denoiser()
    several = isinstance(denoiser, nn.ModuleDict)
    runs: dict[str, torch.dtype] = {}
    for name in adapter.denoiser_names:
        part = denoiser.get_submodule(name) if several else denoiser
        dtype = DTYPES[adapter.component_dtypes.get(name, adapter.dtype)]
        found = map_weights(part, adapter.part_folder(name, weights=True), adapter.variant, dtype)
        runs |= {f"{name}.{key}" if several else key: runs_in for key, runs_in in found.items()}
    return denoiser.eval().requires_grad_(False), runs


def load_from_disk(adapter: Any, denoiser_dtype: str | None = None) -> Any:
    """The pipeline as `adapter.load` has it, its denoisers' weights left in their files while they do not compute.

    denoiser_dtype: that the denoisers are cast to after loading. Samples are equal to the bit to those of `load`.
    """
    denoiser, runs = map_denoiser(adapter)
    if denoiser_dtype is not None:
        runs = retyped(denoiser, runs, DTYPES[denoiser_dtype])
        for buffer in denoiser.buffers():  # those computed from the configuration
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(DTYPES[denoiser_dtype])
    leave_on_disk(denoiser, runs)
    return adapter.load(denoiser)
