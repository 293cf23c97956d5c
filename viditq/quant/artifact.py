"""A quantized denoiser on disk: plan.json, meta.json and model.safetensors in one folder; no pickle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.quant.calibration.context import StepContext
from viditq.quant.convert import build_quantized
from viditq.quant.correction.ptqd import attach_empty
from viditq.quant.description.plan import QuantPlan
from viditq.quant.execution.linear import quant_linears

FORMAT_VERSION = 2
AGAIN = "delete the folder and quantize again"
META, PLAN, MODEL = "meta.json", "plan.json", "model.safetensors"
OWN_KEYS = ("format_version", "timestep_scale", "dtypes", "widened", "equal", "sha256")


def save_denoiser(folder: str | Path, denoiser: nn.Module, plan: QuantPlan, meta: Mapping[str, Any]) -> None:
    """Writes the artifact under a temporary name and renames it to `folder`, replacing an older one.

    meta: JSON values about where the model comes from. Codes stay packed; what is left in float is stored in
    float16 where that loses nothing (checkpoints in float16 run in float32 on a CPU) and widened again on load. What
    variants of one Linear have in common (a weight whose activation alone changes with the segment) is stored once.
    """
    assert not set(meta) & set(OWN_KEYS), f"meta may not use {OWN_KEYS}"
    folder = Path(folder)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        (temporary / PLAN).write_text(plan.to_json())
        tensors = _unshared(denoiser.state_dict())
        equal = _equal_variants(tensors, quant_linears(denoiser))
        tensors = {name: tensor for name, tensor in tensors.items() if name not in equal}
        narrow = {name: t.half() for name, t in tensors.items() if _fits_half(t)}
        save_file(tensors | narrow, temporary / MODEL)
        own = {
            "format_version": FORMAT_VERSION,
            "timestep_scale": _context_of(denoiser).timestep_scale,
            "dtypes": {name: _dtype_name(layer.dtype) for name, layer in quant_linears(denoiser).items()},
            "widened": sorted(narrow),
            "equal": equal,
            "sha256": {name: _sha256(temporary / name) for name in (PLAN, MODEL)},
        }
        full = json.loads(json.dumps({**meta, **own}))
        full["sha256"][META] = _meta_sha256(full)
        (temporary / META).write_text(json.dumps(full, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the artifact {folder}: {error}; free space or choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_denoiser(
    folder: str | Path, build: Callable[[], nn.Module], backend: str = "fake"
) -> tuple[nn.Module, QuantPlan, dict[str, Any], StepContext]:
    """The quantized denoiser, its plan, its meta and its attached context.

    build: returns the float denoiser; its parameters may be on meta, its non-persistent buffers must be real.
    Raises UserError for a missing, truncated or altered file.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    plan = QuantPlan.from_json((folder / PLAN).read_text())
    denoiser = build()
    context = build_quantized(denoiser, plan, backend, meta["timestep_scale"])
    layers = quant_linears(denoiser)
    for name, layer in layers.items():
        for variant in layer.variants:
            variant.dtype = getattr(torch, meta["dtypes"][name])
    tensors = load_file(folder / MODEL)
    tensors |= {name: tensors[name].float() for name in meta["widened"]}
    tensors |= {name: tensors[other] for name, other in meta.get("equal", {}).items()}
    attach_empty(denoiser, tensors, context)
    _check_fits(denoiser, tensors, folder)
    denoiser.load_state_dict(tensors, assign=True)
    on_meta = [name for name, t in (*denoiser.named_parameters(), *denoiser.named_buffers()) if t.is_meta]
    assert not on_meta, f"build() left non-persistent buffers on meta: {on_meta[:3]}"
    for layer in layers.values():
        layer.prepare()
    return denoiser, plan, meta, context


def read_meta(folder: str | Path) -> dict[str, Any]:
    """meta.json, after checking that every file is there and unaltered."""
    folder = Path(folder)
    absent = [name for name in (META, PLAN, MODEL) if not (folder / name).is_file()]
    if len(absent) == 3:
        what = "holds no quantized model" if folder.is_dir() else "is no folder"
        raise UserError(f"{folder} {what}: give the folder `quantized` of a run whose stage quantize is done")
    if absent:
        raise UserError(f"{folder} is no whole quantized model: {absent[0]} is missing; {AGAIN}")
    try:
        meta = json.loads((folder / META).read_text())
        version, digests = meta["format_version"], dict(meta["sha256"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / META} is damaged; {AGAIN}") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{folder} has format version {version}; this program reads {FORMAT_VERSION}; {AGAIN}")
    found = {PLAN: _sha256(folder / PLAN), MODEL: _sha256(folder / MODEL), META: _meta_sha256(meta)}
    for name, digest in found.items():
        if digest != digests.get(name):
            raise UserError(f"{folder / name} is truncated or was altered (its sha256 does not match); {AGAIN}")
    return meta


def size_bytes(folder: str | Path) -> int:
    """Bytes of all files of an artifact."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _check_fits(denoiser: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in denoiser.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    differing = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    if differing:
        name = differing[0]
        raise UserError(
            f"{folder} does not fit this model: {name} is {found.get(name, 'absent')} in the file and "
            f"{wanted.get(name, 'absent')} in the model; build the model it was made from"
        )


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, tied ones stored once per name."""
    seen: set[int] = set()
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        out[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in seen else tensor
        seen.add(tensor.untyped_storage().data_ptr())
    return out


def _equal_variants(tensors: Mapping[str, Tensor], layers: Iterable[str]) -> dict[str, str]:
    """Tensor -> the one of an earlier variant of its Linear that it equals."""
    equal: dict[str, str] = {}
    for layer in layers:
        seen: dict[str, list[str]] = {}
        prefix = f"{layer}.variants."
        for name in (n for n in tensors if n.startswith(prefix)):
            field = name[len(prefix) :].partition(".")[2]
            others = seen.setdefault(field, [])
            same = next((o for o in others if _same(tensors[o], tensors[name])), None)
            if same is None:
                others.append(name)
            else:
                equal[name] = same
    return equal


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and first.dtype == second.dtype and torch.equal(first, second)


def _fits_half(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and torch.equal(tensor.half().float(), tensor)


def _context_of(denoiser: nn.Module) -> StepContext:
    layers = list(quant_linears(denoiser).values())
    return layers[0].context if layers else StepContext((0, 1))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _meta_sha256(meta: Mapping[str, Any]) -> str:
    """Digest of everything in meta.json but the digests."""
    rest = {key: value for key, value in meta.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
