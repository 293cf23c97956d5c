"""The arguments of a block's call, taken apart into a share for each element of the batch, and put together again.

Legend: E elements of the denoiser's batch (prompts times branches), L = E F leading axis of the hidden states, F rows
(frames, patches) of one element.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.mapped import NAMES

ROWS, ELEMENT, SHARED = "rows", "element", "shared"
"""How a tensor belongs to an element: its F rows, its one entry of E, or as a whole (also where that is its own)."""
LARGEST_HALF = 65520.0  # rounds to infinity in float16
PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Share:
    """One element's part of a call. tensors: as stored. meta: JSON of structure, kinds, dtypes and number of rows."""

    tensors: dict[str, Tensor]
    meta: str

    def copied(self) -> Share:
        """The same in memory of its own, which the block cannot change."""
        return Share({name: tensor.clone() for name, tensor in self.tensors.items()}, self.meta)


class Call:
    """The arguments of one call of a block, args first, then kwargs."""

    def __init__(self, block: str, args: Sequence[Any], kwargs: Mapping[str, Any], num_elements: int) -> None:
        self.block, self.num_elements = block, num_elements
        self.tensors: list[Tensor] = []
        self._nested: set[int] = set()  # places of tensors inside tuples: positions, as a rule
        structure = [self._taken_apart(part, None) for part in (list(args), dict(kwargs))]
        leading = next((len(t) for t in self.tensors if t.ndim > 2), None)
        if leading is None and num_elements == 1 and any(t.ndim == 2 for t in self.tensors):
            leading = 1  # sequences [N, C] without a batch axis (Cosmos 3's) are one row, each tensor as a whole
        if leading is None or leading % num_elements:
            raise UserError(
                f"block {block} was called with {leading or 'no'} hidden states for a batch of {num_elements}; inputs "
                "of such blocks cannot be kept one by one. Use quant/rounding=adaround, which goes layer by layer."
            )
        self.num_rows = leading // num_elements
        self._halves: dict[int, tuple[Tensor, list[bool]]] = {}
        kinds = [self._kind(tensor, leading, i in self._nested) for i, tensor in enumerate(self.tensors)]
        self.kinds, pairs = kinds, [*zip(kinds, self.tensors, strict=True)]
        # rows that are all equal (a caption repeated for each frame) are stored once
        self.once = [k == ROWS and self.num_rows > 1 and self._rows_agree(t) for k, t in pairs]
        entries = [[kind, str(t.dtype).removeprefix("torch.")] for kind, t in pairs]
        self.meta = json.dumps({"structure": structure, "tensors": entries, "rows": self.num_rows})

    @property
    def signature(self) -> tuple[Any, ...]:
        """What the size of a stored share depends on."""
        shapes = tuple((*t.shape[1:], once) for t, once in zip(self.tensors, self.once, strict=True))
        return (self.meta, shapes)

    def share(self, element: int) -> Share:
        """One element's part on the CPU, copied only to get there; floating ones in 16 bits unless shared."""
        return Share({str(i): self._part(i, element) for i in range(len(self.tensors))}, self.meta)

    def _part(self, i: int, element: int) -> Tensor:
        tensor, kind = self.tensors[i].detach(), self.kinds[i]
        if kind != SHARED:
            half, fits = self._half(i)
            count = 1 if kind == ELEMENT else self.num_rows
            part = slice(element * count, element * count + (1 if self.once[i] else count))
            tensor = half[part] if fits[element] else tensor[part].bfloat16()
        return tensor.cpu()

    def _half(self, i: int) -> tuple[Tensor, list[bool]]:
        """Tensor `i` as it is stored, and of each element whether float16 can hold it (else it becomes bfloat16)."""
        if i not in self._halves:
            tensor = self.tensors[i].detach()
            if tensor.dtype in (torch.float32, torch.float64) and tensor.numel():  # a stream may have no tokens
                half, flat = tensor.half(), tensor.reshape(self.num_elements, -1)
                # not isfinite of half: 8 times slower on a CPU; a NaN does not fit
                fits = ((flat.amax(1) < LARGEST_HALF) & (flat.amin(1) > -LARGEST_HALF)).tolist()
            else:
                half, fits = tensor, [True] * self.num_elements
            self._halves[i] = (half.cpu(), fits)
        return self._halves[i]

    def _taken_apart(self, value: Any, nested: set[int] | None) -> Any:
        """JSON of `value`; its tensors go to `self.tensors`, and their places to `nested`."""
        if isinstance(value, Tensor):
            if value.dtype not in NAMES:
                raise self._refusal(f"a tensor of {value.dtype}")
            self.tensors.append(value)
            if nested is not None:
                nested.add(len(self.tensors) - 1)
            return {"tensor": len(self.tensors) - 1}
        if isinstance(value, PLAIN):
            return {"value": value}
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {"dict": {key: self._taken_apart(part, nested) for key, part in value.items()}}
        if isinstance(value, list | tuple):
            inside = self._nested if isinstance(value, tuple) else nested
            parts = [self._taken_apart(part, inside) for part in value]
            return {"tuple" if isinstance(value, tuple) else "list": parts}
        raise self._refusal(f"an argument of type {type(value).__name__}")

    def _refusal(self, what: str) -> UserError:
        return UserError(
            f"block {self.block} takes {what}, which cannot be stored. Use quant/rounding=adaround, which goes layer "
            "by layer."
        )

    def _kind(self, tensor: Tensor, leading: int, nested: bool) -> str:
        if tensor.ndim == 0 or (nested and tensor.ndim < 3):
            return SHARED
        if len(tensor) == leading:
            return ROWS
        return ELEMENT if len(tensor) == self.num_elements > 1 else SHARED

    def _rows_agree(self, tensor: Tensor) -> bool:
        rows = tensor.unflatten(0, (self.num_elements, self.num_rows))
        first_two = torch.equal(rows[0, 0], rows[0, 1])  # as a rule they differ, which is quickly told
        return first_two and torch.equal(rows[:, 1:], rows[:, :-1])


@dataclass(frozen=True)
class Stored:
    """A share read back. rows: its number F; `joined` makes calls of several."""

    structure: list[Any]
    entries: list[list[str]]
    rows: int
    tensors: list[Tensor]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], meta: str) -> Stored:
        values = json.loads(meta)
        ordered = [tensors[str(i)] for i in range(len(tensors))]
        return cls(values["structure"], values["tensors"], values["rows"], ordered)

    def goes_with(self, other: Stored) -> bool:
        """Whether the two can share a call: equal shapes, and equal in what has no batch axis."""
        if (self.structure, self.entries) != (other.structure, other.entries):
            return False
        for (kind, _), mine, theirs in zip(self.entries, self.tensors, other.tensors, strict=True):
            if kind == SHARED and not torch.equal(mine, theirs):
                return False
            if mine.shape[1:] != theirs.shape[1:]:
                return False
        return True

    def part(self, i: int, rows: Tensor) -> Tensor:
        """What of tensor `i` belongs to these rows, for concatenation."""
        tensor, kind = self.tensors[i], self.entries[i][0]
        if kind == ROWS:
            return tensor.expand(self.rows, *tensor.shape[1:])[rows]
        return tensor


def joined(
    parts: Sequence[tuple[Stored, Tensor]], dtype: torch.dtype | None, device: torch.device
) -> tuple[list[Any], dict[str, Any]]:
    """args and kwargs of one call with these rows of shares that go together; floating tensors as `dtype`.

    None: each in the dtype that the block was given.
    """
    first = parts[0][0]
    tensors = []
    for i, (kind, name) in enumerate(first.entries):
        pieces = [first.tensors[i]] if kind == SHARED else [stored.part(i, rows) for stored, rows in parts]
        tensor = pieces[0] if len(pieces) == 1 else torch.cat([p.to(pieces[0].dtype) for p in _widened(pieces)])
        original: torch.dtype = getattr(torch, name)
        tensors.append(tensor.to(device, dtype if dtype is not None and original.is_floating_point else original))
    args, kwargs = (_put_together(part, lambda i: tensors[i]) for part in first.structure)
    return args, kwargs


def _widened(pieces: list[Tensor]) -> list[Tensor]:
    """In one dtype, where some were too large for float16."""
    if len({piece.dtype for piece in pieces}) > 1:
        return [piece.float() for piece in pieces]
    return pieces


def _put_together(part: Any, tensor: Callable[[int], Tensor]) -> Any:
    ((kind, value),) = part.items()
    if kind == "tensor":
        return tensor(value)
    if kind == "dict":
        return {key: _put_together(inner, tensor) for key, inner in value.items()}
    if kind in ("list", "tuple"):
        inside = [_put_together(inner, tensor) for inner in value]
        return tuple(inside) if kind == "tuple" else inside
    return value
