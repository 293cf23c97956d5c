"""Minibatches of a block's kept inputs, drawn from disk, with the float block's outputs.

Legend: F rows (frames, patches) of one input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.quant.reconstruction.calls import Stored, joined
from viditq.quant.reconstruction.selection import Item
from viditq.quant.reconstruction.store import BlockStore

INPUTS = 8  # of one batch, at most: where an input has many rows, some of each are drawn
TOLERANCE = 1e-3

Arguments = tuple[list[Any], dict[str, Any]]


@dataclass(frozen=True)
class Batch:
    """Calls of a block (one, unless inputs differ in shape) with their outputs; numel: elements of the outputs."""

    calls: list[tuple[Arguments, list[Tensor]]]

    @property
    def numel(self) -> int:
        return sum(target.numel() for _, targets in self.calls for target in targets)


class Batches:
    """Draws batches of about `tokens` tokens from `items`, each input once before any comes again."""

    def __init__(
        self,
        store: BlockStore,
        block: str,
        items: Sequence[Item],
        exact: nn.Module,
        tokens: int,
        device: torch.device,
    ) -> None:
        self.store, self.block, self.items, self.exact, self.device = store, block, list(items), exact, device
        self._generator = torch.Generator().manual_seed(0)
        self._order: Iterator[int] = iter(())
        first = store.load(block, self.items[0])
        num_rows = len(self.items) * first.rows
        wanted = max(1, round(tokens / _tokens(first)))  # rows
        self.whole = first.rows == 1 or not self._rows_stand_alone(first)
        if self.whole:
            self.num_inputs, self.num_rows = max(1, wanted // first.rows), first.rows
        else:
            self.num_inputs = min(INPUTS, wanted)
            self.num_rows = min(-(-wanted // self.num_inputs), first.rows)
        self.epoch = -(-num_rows // (self.num_inputs * self.num_rows))  # batches that hold as many rows as there are

    def draw(self) -> Batch:
        """The next batch; the same sequence every time."""
        groups: list[list[tuple[Stored, Tensor]]] = []
        for _ in range(self.num_inputs):
            stored = self.store.load(self.block, self.items[self._next()])
            rows = torch.arange(stored.rows)
            if not self.whole:
                rows = torch.randperm(stored.rows, generator=self._generator)[: self.num_rows].sort().values
            group = next((g for g in groups if g[0][0].goes_with(stored)), None)
            groups.append([(stored, rows)]) if group is None else group.append((stored, rows))
        return Batch([self._with_outputs(joined(group, torch.float32, self.device)) for group in groups])

    def _next(self) -> int:
        position = next(self._order, None)
        if position is None:
            self._order = iter(torch.randperm(len(self.items), generator=self._generator).tolist())
            position = next(self._order)
        return position

    @torch.no_grad()
    def _with_outputs(self, arguments: Arguments) -> tuple[Arguments, list[Tensor]]:
        args, kwargs = arguments
        return arguments, outputs(self.exact(*args, **kwargs))

    @torch.no_grad()
    def _rows_stand_alone(self, stored: Stored) -> bool:
        """Whether the block gives the same for some rows of an input as it gives for them among all rows."""
        some = torch.arange(0, stored.rows, 2)
        whole, part = (
            joined([(stored, rows)], torch.float32, self.device) for rows in (torch.arange(stored.rows), some)
        )
        try:
            _, alone = self._with_outputs(part)
        except (RuntimeError, ValueError, TypeError):
            return False  # its shapes need all rows
        pairs = zip(self._with_outputs(whole)[1], alone, strict=True)
        return all(len(a) == stored.rows and _close(a[some.to(a.device)], b) for a, b in pairs)


def outputs(value: Any) -> list[Tensor]:
    """The tensors that a block returns; raises UserError for other kinds of output."""
    parts = [value] if isinstance(value, Tensor) else value
    if not isinstance(parts, list | tuple) or not any(isinstance(part, Tensor) for part in parts):
        raise UserError(
            f"a block returned {type(value).__name__}; block reconstruction needs a tensor or a tuple of tensors. Use "
            "quant/rounding=adaround, which goes layer by layer."
        )
    return [part for part in parts if isinstance(part, Tensor)]


def _close(whole: Tensor, part: Tensor) -> bool:
    return whole.shape == part.shape and float((whole - part).norm()) <= TOLERANCE * float(whole.norm())


def _tokens(stored: Stored) -> int:
    """Of one row of the hidden states, the first argument of three axes that has any; the most of sequences without a
    batch axis.
    """
    sequences = [len(t) for t in stored.tensors if t.ndim == 2]
    return next((t.shape[1] for t in stored.tensors if t.ndim > 2 and t.numel()), max(sequences, default=1))
