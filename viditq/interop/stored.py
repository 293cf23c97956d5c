"""What the files of a quantized part say beside its tensors, in the header of each file.

`viditq` in a file's `__metadata__` is JSON: digests (name -> sha256 of the bytes), widened (name -> the type that it
runs in, where it is stored in another), equal (name -> the tensor that it equals, which is stored once), dtypes (layer
-> the type of the Linear that it stands for). It tells of that file's tensors, or in each file of all of them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.files import stored_entries
from viditq.mapped import DTYPES
from viditq.quant.artifact import tensor_digest
from viditq.quant.artifact_writer import dtype_name, equal_variants, fits_half

NOTE = "viditq"  # the key in the header
FIELDS = ("digests", "widened", "equal", "dtypes")
AGAIN = "download or export it again"


@dataclass
class Stored:
    """Of all files of one part together. entries: name -> shape and type on disk."""

    entries: dict[str, Tensor] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    widened: dict[str, str] = field(default_factory=dict)
    equal: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_files(cls, files: Iterable[Path]) -> Stored:
        """Raises UserError for a file that was cut off, or that another program wrote."""
        found = cls()
        for path in files:
            entries, note = _read(path)
            for name, entry in entries.items():
                found.entries[name] = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]], device="meta")
            for key in FIELDS:
                getattr(found, key).update(note[key])
        for name in found.entries.keys() ^ found.digests.keys():
            raise UserError(f"the files of this model do not belong together: {name} is not as told; {AGAIN}")
        return found

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], dtypes: Mapping[str, str]) -> tuple[dict[str, Tensor], Stored]:
        """What is written of a model's state, and what is said of it: equal variants once, halves where that is
        exact.
        """
        layers = {name.partition(".variants.")[0] for name in state if ".variants." in name}
        equal = equal_variants(state, layers)
        narrow = {n: t.half() if fits_half(t) else t for n, t in state.items() if n not in equal}
        widened = {n: dtype_name(state[n].dtype) for n, t in narrow.items() if t.dtype != state[n].dtype}
        digests = {name: tensor_digest(tensor.cpu()) for name, tensor in narrow.items()}
        return narrow, cls({}, digests, widened, equal, dict(dtypes))

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the model's state, on the meta device."""
        return self.entries | {name: self.entries[other] for name, other in self.equal.items()}

    def note(self) -> dict[str, str]:
        """For a file's `__metadata__`."""
        return {NOTE: json.dumps({key: getattr(self, key) for key in FIELDS}, separators=(",", ":"))}

    def runs(self, name: str) -> torch.dtype:
        """The type that a tensor runs in."""
        name = self.equal.get(name, name)
        wide = self.widened.get(name)
        return self.entries[name].dtype if wide is None else getattr(torch, wide)

    def check(self, name: str, tensor: Tensor) -> None:
        """Raises UserError unless these are the bytes that were written."""
        if tensor_digest(tensor) != self.digests[name]:
            raise UserError(f"{name} was altered or damaged (its sha256 does not match); {AGAIN}")


def _read(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    try:
        entries = stored_entries(path)
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            note = json.loads(file.read(length)).get("__metadata__", {}).get(NOTE)
    except (OSError, ValueError, struct.error) as error:
        raise UserError(f"{path} is truncated or no safetensors file ({error}); {AGAIN}") from error
    if note is None:
        raise UserError(f"{path} was not written by viditq: its header says nothing of digests and types; {AGAIN}")
    return entries, json.loads(note)
