"""Tensors that stay in their files: mapped into memory, read when they are looked at, let go of afterwards.

The library maps whole files as well, privately, which a system with less memory than that may refuse, and its pages
cannot be given back one tensor at a time.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from viditq.files import stored_entries

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
ENTRY_BYTES = 50  # of a header, beside name, shape and offsets
AROUND = 16 * mmap.PAGESIZE  # what Linux maps at once where one page is looked at
PIECE_BYTES = 2**20  # of a tensor that is looked at in pieces, so that what is made of one stays in the cache

_maps: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # by the address of their first byte


def mapped_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, read-only, in the order of the file.

    A tensor that does not start at a multiple of its element's size is copied. Raises OSError or ValueError for a
    damaged file, KeyError for a type of number that torch does not have.
    """
    entries = stored_entries(path)
    if not entries:
        return {}
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():  # that it cannot be written to
        warnings.simplefilter("ignore", UserWarning)
        _maps[torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()] = mapping
        return {name: _tensor(mapping, 8 + length, entry) for name, entry in entries.items()}


def _tensor(mapping: mmap.mmap, data: int, entry: dict[str, Any]) -> Tensor:
    """A storage of its own: what saves or counts tensors goes by those."""
    start, end = entry["data_offsets"]
    dtype, shape, offset = DTYPES[entry["dtype"]], entry["shape"], data + start
    if math.prod(shape) * dtype.itemsize != end - start:
        raise ValueError(f"{shape} numbers of {entry['dtype']} are no {end - start} bytes")
    if start == end:
        return torch.empty(shape, dtype=dtype)
    if offset % dtype.itemsize:
        raw = torch.frombuffer(mapping, dtype=torch.uint8, offset=offset, count=end - start)
        return raw.clone().view(dtype).view(shape)
    return torch.frombuffer(mapping, dtype=dtype, offset=offset, count=(end - start) // dtype.itemsize).view(shape)


def release(tensors: Iterable[Tensor]) -> None:
    """Give back the memory that mapped tensors take, which are read again when they are looked at; others stay."""
    for tensor in tensors:
        for start, mapping in [*_maps.items()]:
            first = tensor.data_ptr() - start if tensor.device.type == "cpu" else -1
            if 0 <= first < len(mapping):
                _drop(mapping, first, first + tensor.nbytes)


def _drop(mapping: mmap.mmap, first: int, end: int) -> None:
    if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        first -= first % AROUND  # what a neighbour has there is read again too
        end = min(end + -end % AROUND, len(mapping))
        mapping.madvise(mmap.MADV_DONTNEED, first, end - first)


def in_pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Rows of a tensor, some MiB at a time; what is mapped is let go of as the next ones are taken."""
    if not tensor.ndim or not tensor.numel():
        yield tensor
        return
    rows = max(PIECE_BYTES // max(tensor[0].nbytes, 1), 1)
    for piece in tensor.split(rows):
        yield piece
        release([piece])


def is_finite(tensor: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether there is neither NaN nor infinity in it (as `dtype`); a tenth of the time of `isfinite` over all."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    dtype = dtype or tensor.dtype
    return all(
        bool(piece.amin().to(dtype).isfinite() and piece.amax().to(dtype).isfinite()) for piece in in_pieces(tensor)
    )


def header_bound(shapes: Mapping[str, Sequence[int]], nbytes: int) -> int:
    """Bytes that the header of a file with these tensors, of `nbytes` at most, takes at most."""
    offset = len(str(nbytes))
    return 8 + sum(len(json.dumps(n)) + len(str([*shape])) + 2 * offset + ENTRY_BYTES for n, shape in shapes.items())


class Writer:
    """A safetensors file written tensor by tensor, so that none is held; its header goes before them in the end."""

    def __init__(self, path: Path, header_bytes: int) -> None:
        """header_bytes: that it may take at most (`header_bound`)."""
        self._file, self._entries = path.open("wb"), dict[str, Any]()
        self.metadata: dict[str, str] = {}
        """What the header says of the whole file; it may be added to until the end."""
        self._room = header_bytes + -header_bytes % 8  # tensors start at a multiple of 8
        self._file.seek(8 + self._room)
        self._end = 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        with self._file as file:
            if error is None:
                entries = ({"__metadata__": self.metadata} if self.metadata else {}) | self._entries
                header = json.dumps(entries, separators=(",", ":")).encode()
                assert len(header) <= self._room
                file.seek(0)
                file.write(struct.pack("<Q", self._room) + header.ljust(self._room))

    def add(self, name: str, tensor: Tensor, digest: Any = None, dtype: torch.dtype | None = None) -> None:
        """Write one; digest: a hash that is told its bytes. dtype: that it is written in, None = its own."""
        start, dtype = self._end, dtype or tensor.dtype
        for piece in in_pieces(tensor.detach()):
            data = piece.to("cpu", dtype).contiguous().view(-1).view(torch.uint8).numpy().data
            self._file.write(data)
            self._end += data.nbytes
            if digest is not None:
                digest.update(data)
        entry = {"dtype": NAMES[dtype], "shape": [*tensor.shape], "data_offsets": [start, self._end]}
        self._entries[name] = entry
