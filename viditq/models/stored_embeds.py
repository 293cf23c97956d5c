"""Embeddings of prompts on disk: what many prompts have in common is stored once, and so are rows that repeat.

A prompt's file holds its own tensors. Those of the negative prompt, which most prompts share, lie beside it in files
named by their content, which the prompt's file names in its metadata. Rows at the end of a tensor that are all alike
(padding with zeros) are stored as one; padding in which an encoder leaves values of its own stays, as activations are
observed there too. What is read is equal to the bit to what was written. Files of earlier versions hold all of it.

Legend: L tokens, D channels.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from viditq.errors import UserError
from viditq.files import is_whole, read_tensors, write_tensors
from viditq.models.text import PromptEmbeds

SHARED, ROWS = "shared", "rows"  # metadata: tensor -> digest of a file of its own; tensor -> its number of rows
NEGATIVE, TENSOR = "negative_", "tensor"


def write_embeds(path: Path, embeds: PromptEmbeds) -> None:
    """Write the embeddings of one prompt."""
    shared: dict[str, str] = {}
    for name in [name for name in embeds if name.startswith(NEGATIVE)]:
        shared[name] = _digest(embeds[name])
        file = shared_file(path, shared[name])
        if not is_whole(file):
            _write(file, {TENSOR: embeds[name]}, {})
    _write(path, {name: value for name, value in embeds.items() if name not in shared}, {SHARED: shared})


def read_embeds(path: Path, remedy: str) -> PromptEmbeds:
    """The embeddings of one prompt, by name in order; raises UserError where a file is missing or damaged."""
    found = _read(path, remedy)
    for name, digest in _metadata(path).get(SHARED, {}).items():
        found[name] = _read(shared_file(path, digest), remedy)[TENSOR]
    return {name: found[name] for name in sorted(found)}


def files_of(path: Path) -> list[Path]:
    """The files that the embeddings of a prompt lie in; its own, where that is not whole."""
    if not is_whole(path):
        return [path]
    return [path, *(shared_file(path, digest) for digest in _metadata(path).get(SHARED, {}).values())]


def are_stored(path: Path) -> bool:
    """Whether all of these files are there and were not cut off."""
    return all(map(is_whole, files_of(path)))


def shared_file(path: Path, digest: str) -> Path:
    """Where a tensor lies that the prompt of this file has in common with others."""
    return path.with_name(f"{SHARED}-{digest}.safetensors")


def _digest(value: Tensor) -> str:
    digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
    digest.update(_as_bytes(value).numpy().data)
    return digest.hexdigest()[:32]


def _as_bytes(value: Tensor) -> Tensor:
    return value.cpu().contiguous().view(-1).view(torch.uint8)


def _write(path: Path, embeds: PromptEmbeds, metadata: dict[str, Any]) -> None:
    kept = {name: _distinct(value) for name, value in embeds.items()}
    rows = {name: value.shape[1] for name, value in embeds.items() if kept[name].shape != value.shape}
    write_tensors(path, kept, {name: json.dumps(value) for name, value in {**metadata, ROWS: rows}.items()})


def _distinct(value: Tensor) -> Tensor:
    """[1, L, D] without the rows at its end that only repeat the one before them, bit by bit (0 is not -0)."""
    if value.ndim != 3 or value.shape[0] != 1 or not value.numel():
        return value
    bits_LB = _as_bytes(value).view(value.shape[1], -1)
    differing = (bits_LB[1:] != bits_LB[:-1]).any(1).nonzero()
    return value[:, : int(differing[-1]) + 2 if len(differing) else 1]


def _read(path: Path, remedy: str) -> PromptEmbeds:
    stored = read_tensors(path, remedy)
    for name, rows in _metadata(path).get(ROWS, {}).items():
        kept = stored[name]
        stored[name] = torch.cat([kept, kept[:, -1:].expand(-1, rows - kept.shape[1], -1)], 1)
    return stored


def _metadata(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            return {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}). Delete it and run the stage prompts.") from error
