"""A whole pipeline in diffusers' own layout: a folder for each part, of which the denoisers are quantized.

What is not quantized is copied, and nothing of it is linked, so that saving over the folder never changes the model
that it was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from viditq.errors import UserError
from viditq.export.copied import copy_part
from viditq.files import is_whole, read_json, write_json
from viditq.interop.folder import CHANGED, DESCRIPTION, VERSION
from viditq.models.adapter import ModelAdapter
from viditq.models.modular import Driver
from viditq.models.registry import find_class
from viditq.models.sampler_noise import check_shrinkable
from viditq.models.schedulers import make_scheduler
from viditq.quant.artifact import read_meta
from viditq.work_folder import end, held, resume, work_folder

STEM = "diffusion_pytorch_model"
WritePart = Callable[[Path, Mapping[str, Any], str, Path, str], None]
"""(folder, config.json of the float part, dtype in its pipeline, artifact, what begins its names in the artifact)."""


def export_pipeline(artifact: Path, out: Path, target: str, write_part: WritePart, changed: str = "") -> None:
    """Write the folder `out`, its denoisers by `write_part`. A killed export goes on at the file that was open.

    changed: what is other than in the artifact, for the card.

    Raises UserError for an artifact that is damaged, for what no pipeline of diffusers can do (quantized text encoders,
    a sampler that makes up for the denoiser's error), and for a folder `out` with other files.
    """
    if is_exported(artifact, out, target):
        return
    meta = read_meta(artifact)
    adapter, key = ModelAdapter.from_dict(meta["model"]), _key(meta, target)
    work = work_folder(out)
    with held(work):
        resume(work, key)
        _write(work, adapter, artifact, key, write_part, changed)
        end(work)
        work.rename(out)


def _write(
    work: Path, adapter: ModelAdapter, artifact: Path, key: Mapping[str, Any], write_part: WritePart, changed: str
) -> None:
    index, several = adapter.index(), len(adapter.denoiser_names) > 1
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[0] is None:
            continue
        if name in adapter.denoiser_names:
            config = read_json(adapter.part_folder(name, weights=False) / "config.json")
            write_part(work / name, config, _dtype_of(adapter, name), artifact, f"{name}." if several else "")
        elif name == "scheduler":
            scheduler = make_scheduler(adapter)
            scheduler.save_pretrained(work / name)
            index[name] = ["diffusers", type(scheduler).__name__]
        else:
            copy_part(adapter.part_folder(name, weights=True), work / name, adapter.variant, _dtype_of(adapter, name))
    write_json(work / "model_index.json", index)
    files = sorted(str(path.relative_to(work)) for path in work.rglob("*.safetensors"))
    write_json(work / DESCRIPTION, _description(adapter, key) | {"files": files, CHANGED: changed})


def is_exported(artifact: Path, out: Path, target: str) -> bool:
    """Whether `out` is this very export; errors as of `export_pipeline`."""
    meta = read_meta(artifact)
    _refuse(target, meta, ModelAdapter.from_dict(meta["model"]))
    return _is_done(out, _key(meta, target))


def _key(meta: Mapping[str, Any], target: str) -> dict[str, Any]:
    return {"artifact": meta["sha256"], "target": target, "version": VERSION}


def _refuse(target: str, meta: Mapping[str, Any], adapter: ModelAdapter) -> None:
    if issubclass(find_class(adapter.pipeline), Driver):
        raise UserError(
            f"--to {target}: {adapter.pipeline} is made of blocks, and diffusers loads its folder in another way. Load "
            "the artifact by viditq.load_quantized."
        )
    if meta.get("text_encoders"):
        raise UserError(
            f"--to {target}: {meta['text_encoders'][0]} is quantized (quant/text_encoder), and transformers, which "
            "loads text encoders, does not know viditq. Quantize with quant/text_encoder=none, or load the artifact by "
            "viditq.load_quantized."
        )
    if meta.get("correction") == "ptqd" and check_shrinkable(make_scheduler(adapter), adapter.call):
        raise UserError(
            f"--to {target}: quant.correction=ptqd makes the noise of a stochastic sampler smaller, which a pipeline "
            "that diffusers loads does not. The nearest is quant.correction=ptqd_mean."
        )


def _is_done(out: Path, key: Mapping[str, Any]) -> bool:
    """Whether `out` is this very export; UserError where it is something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    file = out / DESCRIPTION
    told = read_json(file) if is_whole(file) else {}
    if told.get("key") == dict(key):
        cut = next((out / name for name in told.get("files", ()) if not is_whole(out / name)), None)
        if cut is not None:
            raise UserError(f"{cut} of this export is missing or was cut off. Delete {out}, and export again.")
        return True
    raise UserError(f"{out} is there already and is no export of this artifact. Delete it, or give another --out.")


def _description(adapter: ModelAdapter, key: Mapping[str, Any]) -> dict[str, Any]:
    """What `load_quantized` needs of the pipeline beside diffusers' own files."""
    model = adapter.to_dict() | {"path": ".", "revision": "main", "variant": None, "denoiser_path": None}
    return {"format_version": VERSION, "model": model, "key": dict(key)}


def _dtype_of(adapter: ModelAdapter, name: str) -> str:
    return adapter.component_dtypes.get(name, adapter.dtype)


def shard_file(index: int, num_shards: int) -> str:
    """The name of a file of weights."""
    return f"{STEM}.safetensors" if num_shards == 1 else f"{STEM}-{index + 1:05d}-of-{num_shards:05d}.safetensors"


def write_index(folder: Path, total_size: int, weight_map: Mapping[str, str]) -> None:
    """Which tensor is in which file."""
    values = {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}
    write_json(folder / f"{STEM}.safetensors.index.json", values)
