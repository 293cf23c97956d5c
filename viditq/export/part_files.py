"""One denoiser's folder in diffusers' layout: config.json and files of weights, of which those that are whole stay."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from viditq.export.part import Entry
from viditq.export.pipeline_folder import shard_file, write_index
from viditq.files import atomic, is_whole, write_json
from viditq.mapped import Writer, header_bound, release
from viditq.quant.artifact_writer import SHARD_BYTES, in_shards


def write_files(folder: Path, config: Mapping[str, Any], entries: Sequence[Entry]) -> None:
    """config: what config.json says."""
    shards = in_shards([(entry, nbytes(entry)) for entry in entries], SHARD_BYTES)
    folder.mkdir(parents=True, exist_ok=True)
    for i, mine in enumerate(shards):
        file = folder / shard_file(i, len(shards))
        if not is_whole(file):
            _write(file, mine)
    if len(shards) > 1:
        weight_map = {e.name: shard_file(i, len(shards)) for i, mine in enumerate(shards) for e in mine}
        write_index(folder, sum(map(nbytes, entries)), weight_map)
    write_json(folder / "config.json", dict(config))


def _write(path: Path, entries: Sequence[Entry]) -> None:
    metadata = {"format": "pt"}
    room = header_bound({e.name: e.shape for e in entries}, sum(map(nbytes, entries))) + len(json.dumps(metadata)) + 32
    with atomic(path) as temporary, Writer(temporary, room) as file:
        file.metadata.update(metadata)
        # the widest type first, so that what follows begins at a multiple of its element's size
        for entry in sorted(entries, key=lambda e: (-e.dtype.itemsize, e.name)):
            tensor = entry.make()
            assert (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape), entry.name
            file.add(entry.name, tensor)
            release([tensor])


def nbytes(entry: Entry) -> int:
    return int(torch.Size(entry.shape).numel()) * entry.dtype.itemsize
