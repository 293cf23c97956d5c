"""One input of a block as bytes: a safetensors file.

Written here because the library takes 0.2 ms for each, which is much beside a small block; the library reads them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from functools import lru_cache

import torch
from safetensors.torch import load
from torch import Tensor

from viditq.mapped import NAMES
from viditq.quant.reconstruction.calls import Stored

Layout = tuple[tuple[str, torch.dtype, torch.Size], ...]
"""Name, dtype and shape of each tensor, in the order of their bytes."""


def encoded(tensors: Mapping[str, Tensor], meta: str) -> bytes:
    """A safetensors file of these tensors on the CPU, with meta under "call"."""
    ordered = sorted(tensors.items(), key=lambda named: -named[1].element_size())  # so that all are aligned
    layout = tuple((name, tensor.dtype, tensor.shape) for name, tensor in ordered)
    contents = [_flat(tensor).view(torch.uint8).numpy().data for _, tensor in ordered]
    return b"".join([_header(layout, meta), *contents])


def _flat(tensor: Tensor) -> Tensor:
    """Its numbers in a row. Torch calls a single number contiguous that an `expand` left a stride of 0 (DiT's
    timestep), but looks at no such one as bytes.
    """
    return tensor.contiguous().as_strided((tensor.numel(),), (1,))


def decoded(content: bytes) -> Stored:
    """Inverse of `encoded`; raises what a damaged content raises."""
    (length,) = struct.unpack_from("<Q", content)
    meta = json.loads(content[8 : 8 + length])["__metadata__"]["call"]
    return Stored.of(load(content), meta)


@lru_cache(maxsize=256)
def _header(layout: Layout, meta: str) -> bytes:
    entries, end = {}, 0
    for name, dtype, shape in layout:
        begin, end = end, end + shape.numel() * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": [*shape], "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"call": meta}, **entries}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
