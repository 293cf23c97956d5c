"""A whole pipeline in diffusers' own layout, whose denoisers `import viditq` lets diffusers load as they are.

Codes, scales and types are those of the artifact, to the bit: every scheme goes. What is not quantized is copied, and
nothing of it is linked, so that saving over the folder never changes the model that it was made from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from viditq.errors import UserError
from viditq.export.copied import copy_part
from viditq.files import atomic, is_whole, read_json, write_json
from viditq.interop.folder import DESCRIPTION, VERSION
from viditq.interop.quantizer import ViditqConfig
from viditq.interop.stored import Stored
from viditq.mapped import Writer, header_bound
from viditq.models.adapter import ModelAdapter
from viditq.models.sampler_noise import check_shrinkable
from viditq.quant.artifact import PLAN, StoredTensors, read_meta, tensor_digest
from viditq.quant.artifact_writer import SHARD_BYTES, in_shards
from viditq.quant.description.plan import QuantPlan

STEM = "diffusion_pytorch_model"
KEY = "key.json"


def export(artifact: Path, out: Path) -> None:
    """Write the folder `out`. A killed export goes on at the file that was open.

    Raises UserError for an artifact that is damaged, for what diffusers cannot do (quantized text encoders, a sampler
    that makes up for the denoiser's error), and for a folder `out` with other files.
    """
    meta = read_meta(artifact)
    adapter = ModelAdapter.from_dict(meta["model"])
    _refuse(meta, adapter)
    key = {"artifact": meta["sha256"], "version": VERSION}
    if _is_done(out, key):
        return
    work = out.with_name(f"{out.name}.partial")
    if work.exists() and not (is_whole(work / KEY) and read_json(work / KEY) == key):
        shutil.rmtree(work)
    write_json(work / KEY, key)
    index, several = adapter.index(), len(adapter.denoiser_names) > 1
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[0] is None:
            continue
        if name in adapter.denoiser_names:
            config = read_json(adapter.part_folder(name, weights=False) / "config.json")
            write_part(work / name, config, _dtype_of(adapter, name), artifact, f"{name}." if several else "")
        elif name == "scheduler":
            scheduler = adapter.make_scheduler()
            scheduler.save_pretrained(work / name)
            index[name] = ["diffusers", type(scheduler).__name__]
        else:
            copy_part(adapter.part_folder(name, weights=True), work / name, adapter.variant, _dtype_of(adapter, name))
    write_json(work / "model_index.json", index)
    write_json(work / DESCRIPTION, _description(meta, adapter, key))
    (work / KEY).unlink()
    work.rename(out)


def _refuse(meta: Mapping[str, Any], adapter: ModelAdapter) -> None:
    if meta.get("text_encoders"):
        raise UserError(
            f"--to diffusers: {meta['text_encoders'][0]} is quantized (quant/text_encoder), and transformers, which "
            "loads text encoders, does not know viditq. Quantize with quant/text_encoder=none, or load the artifact by "
            "viditq.load_quantized."
        )
    if meta.get("correction") == "ptqd" and check_shrinkable(adapter.make_scheduler(), adapter.call):
        raise UserError(
            "--to diffusers: quant.correction=ptqd makes the noise of a stochastic sampler smaller, which a pipeline "
            "that diffusers loads does not. The nearest is quant.correction=ptqd_mean."
        )


def _is_done(out: Path, key: Mapping[str, Any]) -> bool:
    """Whether `out` is this very export; UserError where it is something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    file = out / DESCRIPTION
    if is_whole(file) and read_json(file).get("key") == dict(key):
        return True
    raise UserError(f"{out} is there already and is no export of this artifact. Delete it, or give another --out.")


def _description(meta: Mapping[str, Any], adapter: ModelAdapter, key: Mapping[str, Any]) -> dict[str, Any]:
    """What `load_quantized` needs of the pipeline beside diffusers' own files."""
    model = adapter.to_dict() | {"path": ".", "revision": "main", "variant": None, "denoiser_path": None}
    return {"format_version": VERSION, "model": model, "base": adapter.path, "key": dict(key)}


def write_part(folder: Path, config: Mapping[str, Any], dtype: str, artifact: Path, prefix: str = "") -> None:
    """One denoiser's folder, of which the files that are whole stay.

    config: what its config.json says of the float model. dtype: of its pipeline. prefix: what begins the names of its
    tensors in the artifact. Raises UserError for a tensor that is not as it was written.
    """
    meta = read_meta(artifact)
    tensors, told = StoredTensors(artifact, meta), _without_prefix(meta, prefix)
    own = {n.removeprefix(prefix): t for n, t in tensors.state().items() if n.startswith(prefix)}
    own = {n: t for n, t in own.items() if n not in told.equal}
    shards = in_shards([(n, t.nbytes) for n, t in own.items()], SHARD_BYTES)
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"{STEM}.safetensors" if len(shards) == 1 else f"{STEM}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        if not is_whole(folder / file):
            tensors.check(f"{prefix}{n}" for n in names)
            _write_shard(folder / file, {n: own[n] for n in names}, told)
    if len(shards) > 1:
        metadata = {"total_size": sum(t.nbytes for t in own.values())}
        write_json(folder / f"{STEM}.safetensors.index.json", {"metadata": metadata, "weight_map": weight_map})
    plan = _plan_of(QuantPlan.from_json((artifact / PLAN).read_text()), prefix)
    quantization = ViditqConfig(plan, meta["timestep_scale"], dtype, meta.get("float_dtype"))
    write_json(folder / "config.json", {**config, "quantization_config": quantization.to_dict()})


def _dtype_of(adapter: ModelAdapter, name: str) -> str:
    return adapter.component_dtypes.get(name, adapter.dtype)


def _write_shard(path: Path, tensors: Mapping[str, Tensor], told: Stored) -> None:
    digests = {name: told.digests.get(name) or tensor_digest(tensor) for name, tensor in tensors.items()}
    equal = {name: other for name, other in told.equal.items() if other in tensors}
    widened = {name: wide for name, wide in told.widened.items() if name in tensors}
    layers = {name.partition(".variants.")[0] for name in tensors}
    dtypes = {layer: dtype for layer, dtype in told.dtypes.items() if layer in layers}
    metadata = {"format": "pt", **Stored({}, digests, widened, equal, dtypes).note()}
    room = header_bound({n: t.shape for n, t in tensors.items()}, sum(t.nbytes for t in tensors.values()))
    with atomic(path) as temporary, Writer(temporary, room + len(json.dumps(metadata)) + 32) as file:
        file.metadata.update(metadata)
        # the widest type first, so that what follows begins at a multiple of its element's size
        for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
            file.add(name, tensors[name])


def _without_prefix(meta: Mapping[str, Any], prefix: str) -> Stored:
    """What meta.json says of the tensors of one denoiser."""

    def of(key: str) -> dict[str, str]:
        values = meta.get(key) or {}
        values = values if isinstance(values, Mapping) else dict.fromkeys(values, "float32")  # format 2
        return {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)}

    equal = {name: other.removeprefix(prefix) for name, other in of("equal").items()}
    return Stored({}, of("digests"), of("widened"), equal, of("dtypes"))


def _plan_of(plan: QuantPlan, prefix: str) -> QuantPlan:
    layers = {n.removeprefix(prefix): schemes for n, schemes in plan.layers.items() if n.startswith(prefix)}
    used = {scheme for schemes in layers.values() for scheme in schemes}
    return replace(plan, schemes={n: s for n, s in plan.schemes.items() if n in used}, layers=layers)
