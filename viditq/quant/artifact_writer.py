"""Writes an artifact shard by shard, each from tensors that are made one layer at a time and then let go of.

A shard is there or not: it is written under a temporary name, and a record beside it (digests, types) comes last. So
a killed writer goes on at the shard that was open, and several processes can share the shards of one artifact.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.files import atomic, is_whole, read_json, write_json
from viditq.mapped import Writer, header_bound
from viditq.quant.artifact import (
    FORMAT_VERSION,
    INDEX,
    META,
    MODEL,
    OWN_KEYS,
    PLAN,
    file_sha256,
    meta_sha256,
    model_files,
    read_meta,
)
from viditq.quant.calibration.context import StepContext, TimestepScaleLike
from viditq.quant.description.plan import QuantPlan
from viditq.quant.execution.linear import QuantLinear, quant_linears
from viditq.work_folder import end, resume

SHARD_BYTES = 10**9
Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Content:
    """Tensors that belong together. runs: of those that are stored in another type than they run in. dtypes: of the
    QuantLinears among them, by name. equal: names -> the tensor, of this or another content, that they stand for.
    casts: the types that tensors are written in, of those that have another.
    """

    tensors: Mapping[str, Tensor]
    runs: Mapping[str, torch.dtype] = field(default_factory=dict)
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    equal: Mapping[str, str] = field(default_factory=dict)
    casts: Mapping[str, torch.dtype] = field(default_factory=dict)


def content_of(layers: Mapping[str, QuantLinear]) -> Content:
    """What is stored of QuantLinears: prefix in the denoiser's state -> layer."""
    tensors = {k: t for name, layer in layers.items() for k, t in layer.state_dict(prefix=f"{name}.").items()}
    return Content(tensors, dtypes={name: layer.dtype for name, layer in layers.items()})


class ArtifactWriter:
    """One artifact in the making. work: the folder in which it grows; it is renamed to `folder` in the end."""

    def __init__(self, folder: Path, work: Path, num_shards: int) -> None:
        self.folder, self.work, self.num_shards = folder, work, num_shards

    def begin(self, key: Any) -> list[int]:
        """The shards that are missing. key: JSON of what decides the tensors; what was made with another is deleted."""
        resume(self.work, key)
        shards = range(self.num_shards)
        return [i for i in shards if not (is_whole(self._record(i)) and is_whole(self.work / self.shard(i)))]

    def shard(self, index: int) -> str:
        """The name of a shard's file."""
        return shard_name(index, self.num_shards)

    def _record(self, index: int) -> Path:
        return self.work / f"{self.shard(index)}.json"

    def write(self, index: int, header_bytes: int, contents: Iterable[Content]) -> None:
        """Write one shard, of tensors whose header takes at most header_bytes; raises UserError for a full disk."""
        record: dict[str, Any] = {"digests": {}, "equal": {}, "widened": {}, "dtypes": {}}
        path = self.work / self.shard(index)
        with _explained(self.folder), atomic(path) as temporary, Writer(temporary, header_bytes) as file:
            for content in contents:
                self._add(file, content, record)
        with _explained(self.folder):
            write_json(self._record(index), record)

    def _add(self, file: Writer, content: Content, record: dict[str, Any]) -> None:
        equal = equal_variants(content.tensors, content.dtypes)
        # the widest type first, so that what follows begins at a multiple of its element's size
        dtypes = {name: content.casts.get(name, t.dtype) for name, t in content.tensors.items() if name not in equal}
        for name in sorted(dtypes, key=lambda name: (-dtypes[name].itemsize, name)):
            digest = hashlib.sha256()
            file.add(name, content.tensors[name], digest, dtypes[name])
            record["digests"][name] = digest.hexdigest()
        record["equal"] |= equal | dict(content.equal)
        record["widened"] |= {name: dtype_name(dtype) for name, dtype in content.runs.items()}
        record["dtypes"] |= {name: dtype_name(dtype) for name, dtype in content.dtypes.items()}

    def finish(self, plan: QuantPlan, meta: Mapping[str, Any], timestep_scale: TimestepScaleLike) -> None:
        """Write what is said of the whole, and put it in its place; every shard is there."""
        assert not set(meta) & set(OWN_KEYS), f"meta may not use {OWN_KEYS}"
        own: dict[str, Any] = {"format_version": FORMAT_VERSION, "timestep_scale": timestep_scale}
        weight_map: dict[str, str] = {}
        for i in range(self.num_shards):
            record = read_json(self._record(i))
            for key, part in record.items():
                own[key] = own.get(key, {}) | part
            weight_map |= dict.fromkeys(record["digests"], self.shard(i))
        with _explained(self.folder):
            (self.work / PLAN).write_text(plan.to_json())
            if self.num_shards > 1:
                total = sum((self.work / self.shard(i)).stat().st_size for i in range(self.num_shards))
                write_json(self.work / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
            _write_meta(self.work, {**meta, **own})
            for record in map(self._record, range(self.num_shards)):
                record.unlink(missing_ok=True)
            end(self.work)
            shutil.rmtree(self.folder, ignore_errors=True)
            self.work.rename(self.folder)


def shard_name(index: int, num_shards: int) -> str:
    """model.safetensors, or model-00001-of-00003.safetensors."""
    stem, suffix = MODEL.rsplit(".", 1)
    return MODEL if num_shards == 1 else f"{stem}-{index + 1:05d}-of-{num_shards:05d}.{suffix}"


def in_shards(sized: Sequence[tuple[Thing, int]], limit: int) -> list[list[Thing]]:
    """Things in turn, as many in a shard as `limit` bytes hold; at least one shard, and one thing in each."""
    shards: list[list[Thing]] = [[]]
    room = limit
    for thing, nbytes in sized:
        if shards[-1] and nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(thing)
        room -= nbytes
    return shards


def save_denoiser(folder: str | Path, denoiser: nn.Module, plan: QuantPlan, meta: Mapping[str, Any]) -> None:
    """Writes the artifact under a temporary name and renames it to `folder`, replacing an older one.

    meta: JSON values about where the model comes from. Codes stay packed; what is left in float is stored in
    float16 where that loses nothing (checkpoints in float16 run in float32 on a CPU) and widened again on load. What
    variants of one Linear have in common (a weight whose activation alone changes with the segment) is stored once.
    """
    folder = Path(folder)
    contents = [*_contents(denoiser)]
    sized = [(content, sum(t.nbytes for t in content.tensors.values())) for content in contents]
    shards = in_shards(sized, SHARD_BYTES)
    writer = ArtifactWriter(folder, folder.with_name(f"{folder.name}.{os.getpid()}.tmp"), len(shards))
    try:
        with _explained(folder):
            writer.begin(None)
        for i, shard in enumerate(shards):
            writer.write(i, _header_bytes(shard), shard)
        writer.finish(plan, meta, _context_of(denoiser).timestep_scale)
    finally:
        shutil.rmtree(writer.work, ignore_errors=True)


def _header_bytes(contents: Sequence[Content]) -> int:
    tensors = {name: tensor for content in contents for name, tensor in content.tensors.items()}
    return header_bound({name: t.shape for name, t in tensors.items()}, sum(t.nbytes for t in tensors.values()))


def _contents(denoiser: nn.Module) -> Iterator[Content]:
    layers, state = quant_linears(denoiser), denoiser.state_dict()
    alias = {id(layer): name for name, layer in layers.items()}
    prefixes = {n: alias[id(m)] for n, m in denoiser.named_modules(remove_duplicate=False) if id(m) in alias}
    inside = {name: next((p for p in _parents(name) if p in prefixes), None) for name in state}
    for name, tensor in state.items():
        if inside[name] is None:
            tensor = tensor.detach().cpu()
            half = fits_half(tensor)
            yield Content({name: tensor.half() if half else tensor}, {name: tensor.dtype} if half else {})
    for prefix, name in prefixes.items():
        tensors = {n: t.detach().cpu() for n, t in state.items() if inside[n] == prefix}
        narrow = {n: t.half() for n, t in tensors.items() if fits_half(t)}
        runs = {n: tensors[n].dtype for n in narrow}
        yield Content(tensors | narrow, runs, {prefix: layers[name].dtype} if prefix == name else {})


def _parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1))


def save_with(
    source: Path, folder: Path, tensors: Mapping[str, Tensor], plan: QuantPlan, meta: Mapping[str, Any]
) -> None:
    """The artifact `source` linked or copied to `folder`, with a shard of `tensors` more, if any, and other `meta`."""
    old, files = read_meta(source), model_files(source)
    work = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    writer = ArtifactWriter(folder, work, len(files) + bool(tensors))
    try:
        with _explained(folder):
            writer.begin(None)
        where: dict[str, str] = _weight_map(source) or dict.fromkeys(old["digests"], MODEL)
        for i, name in enumerate(files):
            _link(source / name, work / writer.shard(i))
            mine = {tensor for tensor, file in where.items() if file == name}
            record = {"digests": {n: d for n, d in old["digests"].items() if n in mine}}
            rest = {key: old[key] if i == 0 else {} for key in ("equal", "widened", "dtypes")}
            write_json(work / f"{writer.shard(i)}.json", record | rest)
        if tensors:
            writer.write(len(files), _header_bytes([Content(tensors)]), [Content(tensors)])
        writer.finish(plan, meta, old["timestep_scale"])
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _weight_map(folder: Path) -> dict[str, str]:
    return dict(read_json(folder / INDEX)["weight_map"]) if (folder / INDEX).is_file() else {}


def _write_meta(folder: Path, meta: Mapping[str, Any]) -> None:
    full = json.loads(json.dumps(meta))
    full["sha256"] = {name: file_sha256(folder / name) for name in (PLAN, INDEX) if (folder / name).is_file()}
    full["sha256"][META] = meta_sha256(full)
    (folder / META).write_text(json.dumps(full, indent=1) + "\n")


def equal_variants(tensors: Mapping[str, Tensor], layers: Iterable[str]) -> dict[str, str]:
    """Tensor -> the one of an earlier variant of its Linear that it equals."""
    equal: dict[str, str] = {}
    for layer in layers:
        seen: dict[str, list[str]] = {}
        prefix = f"{layer}.variants."
        for name in (n for n in tensors if n.startswith(prefix)):
            field_name = name[len(prefix) :].partition(".")[2]
            others = seen.setdefault(field_name, [])
            same = next((o for o in others if _same(tensors[o], tensors[name])), None)
            if same is None:
                others.append(name)
            else:
                equal[name] = same
    return equal


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and first.dtype == second.dtype and torch.equal(first, second)


def fits_half(tensor: Tensor) -> bool:
    """Whether float16 holds a float32 tensor exactly."""
    return tensor.dtype == torch.float32 and torch.equal(tensor.half().float(), tensor)


def _context_of(denoiser: nn.Module) -> StepContext:
    layers = list(quant_linears(denoiser).values())
    return layers[0].context if layers else StepContext((0, 1))


def dtype_name(dtype: torch.dtype) -> str:
    """As meta.json has it: float32, bfloat16."""
    return str(dtype).removeprefix("torch.")


class _explained:
    """The system's errors as a UserError that says what to do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError | SafetensorError):
            raise UserError(
                f"cannot write the artifact {self.folder}: {error}; free space or choose another folder"
            ) from error
