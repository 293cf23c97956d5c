"""Keeps inputs of blocks while a denoiser samples, within a budget of bytes, on disk.

Legend: E elements of the denoiser's batch, P prompts, branches = E / P of guidance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.quant.calibration.context import Attachment, StepContext, TimestepScaleLike, denoisers_of
from viditq.quant.calibration.observers import NUM_BUCKETS
from viditq.quant.calibration.step_rows import seeded_batch_size
from viditq.quant.reconstruction.calls import Call, Share
from viditq.quant.reconstruction.check import check_alone
from viditq.quant.reconstruction.encoding import encoded
from viditq.quant.reconstruction.selection import LEVELS, Item, ranked
from viditq.quant.reconstruction.slots import START, slot_size
from viditq.quant.reconstruction.store import BlockStore, room

PREFIX = "@inputs/"  # no module has such a name


class BlockInputs:
    """Context manager that keeps inputs of `blocks` in `folder` while `denoiser` samples.

    Used as a Calibrator is: `set_sample_seeds` before a batch, `state` after it. Each block gets an equal share of
    budget, in bytes of files; how many inputs that is follows from the largest one seen. What is kept depends neither
    on the order of batches nor on how often they were begun (`selection`). While several processes collect at once,
    each with a `writer` number of its own, each may keep as much; `finish` then leaves what one would have kept. Raises
    UserError when a block's share is too small for one input, or when its calls cannot be taken apart.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        blocks: Sequence[str],
        folder: Path,
        budget: int,
        timestep_scale: TimestepScaleLike = 1000.0,
        num_buckets: int = NUM_BUCKETS,
        writer: int = 0,
    ) -> None:
        self.store, self.budget, self.blocks = BlockStore(folder, writer), budget, list(blocks)
        self._denoiser, self._num_buckets = denoiser, num_buckets
        self._context = StepContext((0, 1), timestep_scale)
        self._context.check(denoiser)
        self._share = budget // max(len(self.blocks), 1)
        self._kept = {block: self.store.present(block) for block in self.blocks}
        self._largest = dict.fromkeys(self.blocks, 0)
        self._sizes: dict[Any, int] = {}
        self._seen = dict.fromkeys(self.blocks, 0)
        self._batch: dict[str, set[Item]] = {block: set() for block in self.blocks}  # what of `seen` is of this batch
        self._checked: set[tuple[Any, ...]] = set()  # blocks, and how tensors belonged to elements
        self._unchecked: dict[str, Share] = {}  # element 0 of a call, until its output is there
        self._seeds: list[int] = []
        self._num_elements = 0
        self._calls: Counter[float] = Counter()  # of the denoiser, at each noise level, for these prompts
        self._attachment: Attachment | None = None

    def set_sample_seeds(self, seeds: Sequence[int]) -> None:
        """One whole number per prompt of the coming batch, the same whenever that prompt is sampled."""
        self._seeds = list(seeds)
        self._calls.clear()
        for items in self._batch.values():
            items.clear()

    def state(self) -> dict[str, Tensor]:
        """Of each block: bytes of its largest input, number of inputs seen; `joined_states` adds two states up."""
        return {f"{PREFIX}{b}": torch.tensor([self._largest[b], self._seen[b]]) for b in self.blocks}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continues from a `state()`; raises UserError when it is of other blocks, or its inputs are gone."""
        if state.keys() != self.state().keys():
            raise UserError("the saved state is of other blocks than this model's")
        for block in self.blocks:
            self._largest[block], self._seen[block] = state[f"{PREFIX}{block}"].tolist()
        check_present(self.store, self.budget, state)

    def __enter__(self) -> BlockInputs:
        parts = denoisers_of(self._denoiser).values()
        handles = [part.register_forward_pre_hook(self._begin_step, with_kwargs=True) for part in parts]
        for block in self.blocks:
            module = self._denoiser.get_submodule(block)
            handles.append(module.register_forward_pre_hook(self._hook(block), with_kwargs=True))
            handles.append(module.register_forward_hook(self._check(block)))
        self._attachment = Attachment([*handles, *self._context.attach(self._denoiser).handles])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._attachment is not None
        self._attachment.remove()

    def _begin_step(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._num_elements = seeded_batch_size([*args, *kwargs.values()], self._seeds)
        assert self._context.noise_level is not None
        self._calls[self._context.noise_level] += 1

    def _hook(self, block: str) -> Any:
        @torch.no_grad()
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            level = self._context.noise_level
            if level is None:
                raise UserError(f"{block} was called outside its denoiser while calibrating")
            call = Call(block, args, kwargs, self._num_elements)
            self._largest[block] = max(self._largest[block], self._size(call))
            if not room(self._share, self._largest[block]):
                self._refuse(block)
            if (block, *call.kinds) not in self._checked:
                self._checked.add((block, *call.kinds))
                self._unchecked[block] = call.share(0).copied()
            items = [self._item(element, level) for element in range(self._num_elements)]
            self._seen[block] += len({*items} - self._batch[block])
            self._batch[block] |= {*items}
            self._select(block, call, items)

        return keep

    def _check(self, block: str) -> Any:
        def check(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            share = self._unchecked.pop(block, None)
            if share is not None:
                check_alone(block, module, share, output)

        return check

    def _item(self, element: int, level: float) -> Item:
        """Guidance stacks its branches, or calls the denoiser once for each."""
        branches, prompts = self._num_elements // len(self._seeds), len(self._seeds)
        branch = (self._calls[level] - 1) * branches + element // prompts
        return Item(self._seeds[element % prompts], int(level * LEVELS), branch)

    def _select(self, block: str, call: Call, items: list[Item]) -> None:
        before = self._kept[block]
        kept, most = before | {*items}, room(self._share, self._largest[block])
        if len(kept) > most:
            kept = {*ranked(block, kept, self._num_buckets)[:most]}
        self._kept[block] = kept
        for item in before - kept:
            self.store.remove(block, item)
        for element, item in enumerate(items):
            if item in kept:
                self.store.write(block, item, call.share(element), self._largest[block])

    def _size(self, call: Call) -> int:
        """Bytes of the slot of one share; equal for equal shapes."""
        if call.signature not in self._sizes:
            share = call.share(0)
            slack = -(-len(share.tensors) // 8) * 8  # a bfloat16 takes a letter more in the header than a float16
            self._sizes[call.signature] = slot_size(len(encoded(share.tensors, share.meta)) + slack)
        return self._sizes[call.signature]

    def _refuse(self, block: str) -> None:
        need, count = self._largest[block] + START.size, len(self.blocks)
        raise UserError(
            f"calibration.block_input_bytes={self.budget:,} is too small: one input of block {block} takes {need:,} "
            f"bytes, and {count} blocks share the budget. Give at least {need * count:,}; 16 inputs a block, "
            f"{16 * need * count:,}, is a sensible minimum."
        )


def joined_states(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What two processes, or two parts of a pass, have seen."""
    return {
        key: torch.stack([torch.maximum(state[0], theirs[key][0]), state[1] + theirs[key][1]])
        for key, state in mine.items()
    }


def check_present(store: BlockStore, budget: int, state: Mapping[str, Tensor]) -> None:
    """Raises UserError if inputs that must have been kept are not there: files were deleted or damaged."""
    for key, (size, seen) in ((key, value.tolist()) for key, value in state.items()):
        block = key.removeprefix(PREFIX)
        largest = max(size, store.slot_size(block))  # a batch that was not saved may have brought a larger input
        wanted, found = min(seen, room(budget // len(state), largest)) if size else 0, len(store.present(block))
        if found < wanted:
            raise UserError(
                f"{store.folder} holds {found} of the {wanted} inputs of block {block} that an unfinished calibration "
                "has kept: files were deleted or damaged"
            )


def finish(store: BlockStore, budget: int, state: Mapping[str, Tensor], num_buckets: int) -> dict[str, Any]:
    """Write the index; state: the joined one of all processes. UserError for a block that was never called."""
    numbers = {key.removeprefix(PREFIX): value.tolist() for key, value in state.items()}
    silent = [block for block, (size, _) in numbers.items() if not size]
    if silent:
        raise UserError(
            f"block {silent[0]} was never called as a module, so that it has no inputs to reconstruct it on. Use "
            "quant/rounding=adaround, which goes layer by layer."
        )
    store.reread()
    check_present(store, budget, state)
    return store.finish(budget, numbers, num_buckets)
