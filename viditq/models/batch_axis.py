"""How embeddings of several prompts are joined, so that these can be sampled together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from viditq.models.trial import returned_text

CUMULATIVE = "cu_seqlens"
"""In the names of the lengths of all texts of a batch, added up: int [number of prompts + 1], beginning with 0."""
_measured: dict[tuple[Any, ...], dict[str, int]] = {}


def can_be_joined(adapter: Any, name: str, value: Tensor) -> bool:
    """Whether `joined` knows how to lay other prompts' values beside this one, of one prompt."""
    return _is_cumulative(name, value) or batch_axis(adapter, name, value) is not None


def joined(adapter: Any, name: str, values: Sequence[Tensor]) -> Tensor:
    """One argument of the call for all these prompts, of values for one prompt each."""
    if _is_cumulative(name, values[0]):
        return torch.cat([values[0][:1], torch.cat([value.diff() for value in values]).cumsum(0).to(values[0].dtype)])
    axis = batch_axis(adapter, name, values[0])
    assert axis is not None, "can_be_joined comes first"
    return torch.cat([*values], axis)


def _is_cumulative(name: str, value: Tensor) -> bool:
    """Whether these are lengths in a row, of one prompt (Kandinsky 5)."""
    return CUMULATIVE in name and value.shape == (2,) and int(value[0]) == 0


def batch_axis(adapter: Any, name: str, value: Tensor) -> int | None:
    """The axis along which prompts lie in the call's argument `name`; None where it cannot be told.

    value: of one prompt, encoded alone: its one axis of 1, wherever that is (HiDream's Llama has its layers before it).
    Where several are 1 (a single token) `encode_prompt` is measured; where none is nobody knows.
    """
    ones = [axis for axis, size in enumerate(value.shape) if size == 1]
    if adapter.list_embeds:
        return 0  # of a list of tensors, one a prompt, stored as one tensor
    return ones[0] if len(ones) == 1 else _of_several(adapter, name, ones)


def _of_several(adapter: Any, name: str, ones: list[int]) -> int | None:
    if not ones or adapter.conditioning != "text":
        return None
    key = (adapter.path, adapter.revision, adapter.pipeline, *adapter.encode_outputs)
    if key not in _measured:
        found = returned_text(adapter) or []
        _measured[key] = {one.name: one.batch_axis for one in found if one.name and one.batch_axis is not None}
    told = _measured[key]
    axis = told.get(name, told.get(name.removeprefix("negative_")))  # the negative prompt's are made by the same code
    return axis if axis in ones else None
