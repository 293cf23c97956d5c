"""A whole pipeline in diffusers' own layout, whose denoisers `import viditq` lets diffusers load as they are.

Codes, scales and types are those of the artifact, to the bit: every scheme goes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from viditq.export.pipeline_folder import export_pipeline, shard_file, write_index
from viditq.files import atomic, is_whole, write_json
from viditq.interop.quantizer import ViditqConfig
from viditq.interop.stored import Stored
from viditq.mapped import Writer, header_bound
from viditq.quant.artifact import PLAN, StoredTensors, read_meta, tensor_digest
from viditq.quant.artifact_writer import SHARD_BYTES, in_shards
from viditq.quant.description.plan import QuantPlan


def export(artifact: Path, out: Path) -> None:
    """Write the folder `out`; errors as of `export_pipeline`."""
    export_pipeline(artifact, out, "diffusers", write_part)


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
        file = shard_file(i, len(shards))
        weight_map |= dict.fromkeys(names, file)
        if not is_whole(folder / file):
            tensors.check(f"{prefix}{n}" for n in names)
            _write_shard(folder / file, {n: own[n] for n in names}, told)
    if len(shards) > 1:
        write_index(folder, sum(t.nbytes for t in own.values()), weight_map)
    plan = _plan_of(QuantPlan.from_json((artifact / PLAN).read_text()), prefix)
    quantization = ViditqConfig(plan, meta["timestep_scale"], dtype, meta.get("float_dtype"))
    write_json(folder / "config.json", {**config, "quantization_config": quantization.to_dict()})


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
