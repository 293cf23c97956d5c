"""A file of equal slots, each with room for one input, so that keeping an input makes no file of its own.

    start:  b"viditq01", bytes of a slot
    slot:   check sum, bytes of the content, item (seed, level, branch); the content; anything

A slot whose check sum does not fit is free: its writer was killed, or the disk was full. Nothing is written to drop an
input; its slot is taken by another one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

from viditq.files import atomic
from viditq.quant.reconstruction.selection import Item

LAYOUT = "slots-1"
MAGIC = b"viditq01"
START = struct.Struct("<8sQ")
HEAD = struct.Struct("<IIqII")


class Slots:
    """The inputs in the file `path`, which may not exist yet; one writer at a time. size: bytes of a slot."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = self._count = 0  # bytes of a slot, number of slots
        self._where: dict[Item, int] = {}
        self._free: list[int] = []
        if path.is_file():
            self._scan()

    def __iter__(self) -> Iterator[Item]:
        return iter([*self._where])

    def __contains__(self, item: object) -> bool:
        return item in self._where

    def get(self, item: Item) -> bytes:
        """The content of an input; raises ValueError if the file is missing, cut off or damaged."""
        try:
            with self.path.open("rb") as file:
                found = self._read(file, self._where[item])
        except (OSError, KeyError) as error:
            raise ValueError(f"{item.name} cannot be read: {error}") from error
        if found is None or found[0] != item:
            raise ValueError(f"the check sum of {item.name} is wrong")
        return found[1]

    def put(self, item: Item, content: bytes, size: int) -> None:
        """Add an input, or replace it by itself; size: bytes of the largest slot needed so far."""
        size = max(size, slot_size(len(content)))
        if size > self.size:
            self._grow(size)
        number = self._where.get(item)
        if number is None:
            number = self._free.pop() if self._free else self._count
        rest = HEAD.pack(0, len(content), *item)[4:]
        with self.path.open("r+b") as file:
            file.seek(START.size + number * self.size)
            file.write(crc32(content, crc32(rest)).to_bytes(4, "little") + rest)
            file.write(content)
        self._where[item] = number
        self._count = max(self._count, number + 1)

    def drop(self, item: Item) -> None:
        """Free the slot of an input, if it has one."""
        number = self._where.pop(item, None)
        if number is not None:
            self._free.append(number)

    def _scan(self) -> None:
        with self.path.open("rb") as file:
            magic, self.size = START.unpack(file.read(START.size).ljust(START.size, b"\0"))
            if magic != MAGIC or self.size < HEAD.size:
                self.size = 0  # no file of ours: the first input writes a new one
                return
            self._count = max(-(-(self.path.stat().st_size - START.size) // self.size), 0)
            for number in range(self._count):
                found = self._read(file, number)
                if found is None or found[0] in self._where:
                    self._free.append(number)
                else:
                    self._where[found[0]] = number

    def _read(self, file: BinaryIO, number: int) -> tuple[Item, bytes] | None:
        """What a slot holds, None if that is not whole."""
        file.seek(START.size + number * self.size)
        head = file.read(HEAD.size)
        if len(head) < HEAD.size:
            return None
        check, length, *item = HEAD.unpack(head)
        content = file.read(length) if length <= self.size - HEAD.size else b""
        return (Item(*item), content) if check == crc32(content, crc32(head[4:])) else None

    def _grow(self, size: int) -> None:
        """Begin the file, or make its slots larger, which happens as often as an input is larger than any before."""
        with atomic(self.path) as temporary:
            with temporary.open("wb") as file:
                file.write(START.pack(MAGIC, size))
            grown = Slots(temporary)
            for item in self._where:
                grown.put(item, self.get(item), size)
        self.size, self._count, self._where, self._free = size, grown._count, grown._where, []


def slot_size(length: int) -> int:
    """Bytes of a slot for `length` bytes of content."""
    return HEAD.size + length
