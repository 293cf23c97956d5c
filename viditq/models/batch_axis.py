"""Along which axis of an embedding prompts lie, so that several can be sampled together."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from viditq.models.trial import returned_text

_measured: dict[tuple[Any, ...], dict[str, int]] = {}


def batch_axis(adapter: Any, name: str, value: Tensor) -> int | None:
    """The axis along which prompts lie in the call's argument `name`; None where it cannot be told.

    value: of one prompt, encoded alone: its one axis of 1, wherever that is (HiDream's Llama has its layers before it).
    Where several are 1 (a single token) `encode_prompt` is measured; where none is (Kandinsky 5's lengths in a row)
    nobody knows.
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
