"""One file a denoiser in ComfyUI's formats, under the names of the model's original release.

Codes and scales are those of the artifact; what the formats cannot hold is refused, or quantized again where that is
asked for, with what it costs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from viditq.errors import UserError
from viditq.export.comfy_file import MADE_BY, ComfyFile
from viditq.export.comfy_formats import refusal
from viditq.export.cost import told_cost
from viditq.export.float_weights import FloatWeights
from viditq.export.folding import folded
from viditq.export.refusal import Refusal, raise_refused, refusals, refuse_correction
from viditq.export.releases import release_of
from viditq.files import is_whole, stored_metadata
from viditq.models.adapter import ModelAdapter
from viditq.quant.artifact import read_meta
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.scheme import LayerScheme
from viditq.work_folder import held, resume, work_folder

BY_NOISE_LEVEL = "the same recipe with segments=[0, 1] and dynamic activations (quant=w8a8_sym)"


def export(artifact: Path, out: Path, requantize: bool = False) -> None:
    """Write `out`, or where a pipeline has several denoisers one file each, with their names before the ending.

    Raises UserError for an artifact that is damaged, a model whose release's names are not known, what the formats
    cannot hold (unless it is to be quantized again), and for files that are there already and hold something else.
    """
    meta = read_meta(artifact)
    refuse_correction("comfyui", meta)
    adapter = ModelAdapter.from_dict(meta["model"])
    denoiser = adapter.build_denoiser()
    again: dict[str, LayerScheme] = {}
    while True:
        tensors, refused = folded(artifact, meta, denoiser, partial(cannot_hold, denoiser=denoiser), requantize, again)
        if not requantize:
            raise_refused("comfyui", refused, True)
        weights = FloatWeights(adapter.build_denoiser(), tensors.plan, tensors) if requantize else None
        parts = dict(denoiser) if isinstance(denoiser, nn.ModuleDict) else {"": denoiser}
        files = {
            _file(out, name): ComfyFile(name, part, adapter, tensors.plan, tensors, refused.keys(), weights)
            for name, part in parts.items()
        }
        again = {layer: scheme for file in files.values() for layer, scheme in file.again.items()}
        if not tensors.touched & again.keys():
            break  # else a tensor's other parts were to be quantized again too: nothing is folded around them
    key = {"artifact": meta["sha256"], "model": adapter.path}
    missing = [path for path in files if not _is_there(path, key)]
    told = told_cost(artifact, adapter, again, weights) if missing and weights is not None and again else {}
    if missing:
        _write({path: files[path] for path in missing}, work_folder(out), key, told)
    if meta.get("text_encoders"):
        print(f"not in it: {', '.join(meta['text_encoders'])}, quantized, which ComfyUI loads from files of their own")


def _write(files: Mapping[Path, ComfyFile], work: Path, key: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    with held(work):
        resume(work, key)
        for path, file in files.items():
            file.write(work / path.name, key, told)
            (work / path.name).replace(path)
        shutil.rmtree(work)


def cannot_hold(plan: QuantPlan, denoiser: nn.Module) -> dict[str, Refusal]:
    """Layer -> why it cannot go. Raises UserError for a denoiser whose release's names are not known."""
    for part in denoiser.values() if isinstance(denoiser, nn.ModuleDict) else (denoiser,):
        release_of(type(part).__name__)
    return refusals(plan, refusal, BY_NOISE_LEVEL)


def _file(out: Path, denoiser: str) -> Path:
    return out.with_name(f"{out.stem}.{denoiser}{out.suffix}") if denoiser else out


def _is_there(path: Path, key: Mapping[str, Any]) -> bool:
    """Whether this very export is there, whole; UserError where something else is."""
    if not path.exists():
        return False
    if stored_metadata(path).get(MADE_BY) == json.dumps(key):
        return is_whole(path)
    raise UserError(f"{path} is there already and is no export of this artifact. Delete it, or give another --out.")
