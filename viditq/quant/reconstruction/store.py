"""Inputs of blocks on disk: `<folder>/<block>/<writer>.slots`, and `index.json` once all of them are there."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from viditq.errors import UserError
from viditq.files import is_whole, read_json, write_json
from viditq.quant.reconstruction.calls import Share, Stored
from viditq.quant.reconstruction.encoding import decoded, encoded
from viditq.quant.reconstruction.selection import Item, ranked
from viditq.quant.reconstruction.slots import START, Slots

INDEX = "index.json"
ENDING = ".slots"


@dataclass(frozen=True)
class BlockStore:
    """Kept inputs of a denoiser's blocks; read one at a time. writer: who writes, if several do at once; 0 reads."""

    folder: Path
    writer: int = 0
    _slots: dict[tuple[str, int], Slots] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def complete(self) -> bool:
        """Whether all inputs that will be kept are there."""
        return is_whole(self.folder / INDEX)

    @cached_property
    def index(self) -> dict[str, Any]:
        """What `finish` wrote: {"budget": bytes, "bytes": of all, "seen": {block: count}, "blocks": {block: names}}."""
        found: dict[str, Any] = read_json(self.folder / INDEX)
        return found

    def items(self, block: str) -> list[Item]:
        """The kept inputs of a block, in the order in which they were chosen; UserError if there are none."""
        names = self.index["blocks"].get(block)
        if not names:
            raise UserError(f"{self.folder} holds no inputs of block {block}. Delete the folder and calibrate again.")
        return [Item.of(name) for name in names]

    def load(self, block: str, item: Item) -> Stored:
        """One input; raises UserError if it is missing or damaged."""
        try:
            return decoded(self.slots(block).get(item))
        except (SafetensorError, KeyError, TypeError, ValueError, struct.error) as error:
            path = self.path(block)
            raise UserError(f"{path} is missing or damaged ({error}). Delete {self.folder} and try again.") from error

    def path(self, block: str, writer: int = 0) -> Path:
        """The file of a block's inputs."""
        return self.folder / block / f"{writer}{ENDING}"

    def slots(self, block: str, writer: int = 0) -> Slots:
        """What is in that file; its heads are read once."""
        key = (block, writer)
        if key not in self._slots:
            self._slots[key] = Slots(self.path(block, writer))
        return self._slots[key]

    # Writing ----------------------------------------------------------------------------------------------------------

    def write(self, block: str, item: Item, share: Share, size: int) -> None:
        """Add an input, or replace it by itself. size: bytes of the largest slot so far."""
        self.slots(block, self.writer).put(item, encoded(share.tensors, share.meta), size)

    def remove(self, block: str, item: Item) -> None:
        """Drop an input that is no longer among the kept."""
        self.slots(block, self.writer).drop(item)

    def present(self, block: str) -> set[Item]:
        """What is there now, finished or not, whoever wrote it."""
        return {item for writer in self._writers(block) for item in self.slots(block, writer)}

    def slot_size(self, block: str) -> int:
        """Bytes of the largest slots of a block's files."""
        return max((self.slots(block, writer).size for writer in self._writers(block)), default=0)

    def reread(self) -> None:
        """Forget what files held: other writers have added to them meanwhile."""
        self._slots.clear()

    def finish(self, budget: int, numbers: Mapping[str, Sequence[int]], num_buckets: int) -> dict[str, Any]:
        """Leave of each block one file with what one process would have kept, and write the index.

        numbers: block -> bytes of a slot, inputs seen.
        """
        share, blocks, total = budget // len(numbers), {}, 0
        for block, (size, _) in numbers.items():
            kept = ranked(block, self.present(block), num_buckets)[: room(share, size)]
            blocks[block] = [item.name for item in kept]
            self._gather(block, kept, size)
            total += self.path(block).stat().st_size
        self.__dict__.pop("index", None)
        seen = {block: count for block, (_, count) in numbers.items()}
        write_json(self.folder / INDEX, {"budget": budget, "bytes": total, "seen": seen, "blocks": blocks})
        return self.index

    def _gather(self, block: str, kept: list[Item], size: int) -> None:
        """All of `kept` in the file of writer 0; the others' files are deleted when that is done."""
        own, others = self.slots(block), [self.slots(block, w) for w in self._writers(block) if w]
        for item in {*own} - {*kept}:
            own.drop(item)
        for item in kept:
            if item not in own:
                own.put(item, next(other.get(item) for other in others if item in other), size)
        for other in others:
            other.path.unlink()

    def _writers(self, block: str) -> list[int]:
        files = (self.folder / block).glob(f"[!.]*{ENDING}")
        return sorted(int(path.name.removesuffix(ENDING)) for path in files)


def room(share: int, size: int) -> int:
    """How many slots of `size` bytes a file of at most `share` bytes has."""
    return max(share - START.size, 0) // size
