"""Inputs of blocks on disk: `<folder>/<block>/<item>.safetensors`, and `index.json` once all of them are there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from viditq.errors import UserError
from viditq.files import atomic, is_whole, read_json, write_json
from viditq.quant.reconstruction.calls import Share, Stored
from viditq.quant.reconstruction.selection import Item, ranked

INDEX = "index.json"
ENDING = ".safetensors"


@dataclass(frozen=True)
class BlockStore:
    """Kept inputs of a denoiser's blocks; read one at a time."""

    folder: Path

    @property
    def complete(self) -> bool:
        """Whether all inputs that will be kept are there."""
        return is_whole(self.folder / INDEX)

    @cached_property
    def index(self) -> dict[str, Any]:
        """What `finish` wrote: {"budget": bytes, "bytes": of all files, "blocks": {block: names of its items}}."""
        found: dict[str, Any] = read_json(self.folder / INDEX)
        return found

    def items(self, block: str) -> list[Item]:
        """The kept inputs of a block, in the order in which they were chosen; UserError if there are none."""
        names = self.index["blocks"].get(block)
        if not names:
            raise UserError(f"{self.folder} holds no inputs of block {block}. Delete the folder and calibrate again.")
        return [Item.of(name) for name in names]

    def load(self, block: str, item: Item) -> Stored:
        """One input; raises UserError if its file is missing or damaged."""
        path = self.path(block, item)
        try:
            with safe_open(path, "pt") as file:
                names = [*file.keys()]  # a safetensors file is no mapping
                return Stored.of({name: file.get_tensor(name) for name in names}, file.metadata()["call"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is missing or damaged ({error}). Delete {self.folder} and try again.") from error

    def path(self, block: str, item: Item) -> Path:
        """The file of one input."""
        return self.folder / block / f"{item.name}{ENDING}"

    # Writing ----------------------------------------------------------------------------------------------------------

    def write(self, block: str, item: Item, share: Share) -> None:
        """Add an input, or replace it by itself."""
        with atomic(self.path(block, item)) as temporary:
            temporary.write_bytes(encoded(share.tensors, share.meta))

    def remove(self, block: str, item: Item) -> None:
        """Drop an input that is no longer among the kept."""
        self.path(block, item).unlink(missing_ok=True)

    def present(self, block: str) -> list[Item]:
        """What is there now, finished or not."""
        return [Item.of(path.name.removesuffix(ENDING)) for path in (self.folder / block).glob(f"[!.]*{ENDING}")]

    def finish(self, budget: int, largest: Mapping[str, int], num_buckets: int) -> dict[str, Any]:
        """Drop what several processes kept too many of, and write the index. largest: block -> bytes of an input."""
        share, blocks, total = budget // len(largest), {}, 0
        for block, size in largest.items():
            order = ranked(block, self.present(block), num_buckets)
            kept, rest = order[: share // size], order[share // size :]
            for item in rest:
                self.remove(block, item)
            blocks[block] = [item.name for item in kept]
            total += sum(self.path(block, item).stat().st_size for item in kept)
        self.__dict__.pop("index", None)
        write_json(self.folder / INDEX, {"budget": budget, "bytes": total, "blocks": blocks})
        return self.index


def encoded(tensors: Mapping[str, Tensor], meta: str) -> bytes:
    """The content of a file."""
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"call": meta})
