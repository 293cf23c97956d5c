"""Embeddings that were made up, so that it can be seen where a pipeline's own code hands them on to.

Legend: L tokens, D channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from viditq.models.guess import returned_names
from viditq.models.registry import find_class

NUM_TOKENS = 8
KINDS = ("embeds", "mask")  # of arguments that are known by their names
COPIES = ("num_images_per_prompt", "num_videos_per_prompt")
PLAIN = (1, NUM_TOKENS, NUM_TOKENS)
SHAPES = (PLAIN, (1, *PLAIN), (1, NUM_TOKENS, 1, NUM_TOKENS))  # an encoder's layers before, or after, tokens
TEXTS = (None, "a")  # beside embeddings: some ask for it all the same


class Returned(NamedTuple):
    """A value that `encode_prompt` returns: the call's argument that takes it, and the axis that prompts lie along."""

    name: str | None
    batch_axis: int | None


def embeddings(adapter: Any, marked: bool = False, width: int = NUM_TOKENS) -> tuple[Any, ...]:
    """What `encode_prompt` would return, of any size: only stand-ins see it, and pipelines that pad to `width`.

    marked: each with a number of its own.
    """
    count, found = len(adapter.encode_outputs), returned_names(find_class(adapter.pipeline))
    theirs = next((names for names in found if len(names) == count), [""] * count)
    names = [name or own for name, own in zip(adapter.encode_outputs, theirs, strict=True)]
    shape = (*PLAIN[:2], width)
    values = [_made(name, _mark(i) if marked else 0, shape) for i, name in enumerate(names)]
    return tuple([v[0]] if adapter.list_embeds and v.ndim == 3 else v for v in values)


def _mark(place: int) -> float:
    """Numbers that pipelines do not make themselves and that 16 bits hold: -65/128, -67/128, ..."""
    return -(65 + 2 * place) / 128


def _made(name: str, number: float, shape: tuple[int, ...] = PLAIN) -> Tensor:
    if "mask" in name:
        return torch.ones(1, NUM_TOKENS, dtype=torch.long)
    return torch.full((1, NUM_TOKENS) if "pooled" in name else shape, float(number))


def marks_in(value: Any, count: int) -> list[int]:
    """Which of `embeddings(marked=True)` a tensor, or a list of them, holds."""
    if isinstance(value, list | tuple):
        return sorted({mark for one in value for mark in marks_in(one, count)})
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_meta:
        return []
    return [i for i in range(count) if bool((value == _mark(i)).any())]


def handed_on(pipeline: Any, asked: Mapping[str, Any]) -> list[Returned] | None:
    """What `encode_prompt` returns: it is given the call's arguments for embeddings, marked, and they come back.

    asked: what else it is given. None where it does not take embeddings that were made before, or fails.
    """
    of_text, of_call = (inspect.signature(f).parameters for f in (pipeline.encode_prompt, pipeline.__call__))
    names = [name for name in of_text if name in of_call and _takes_embeddings(of_text[name])]
    copies = next((name for name in COPIES if name in of_text), None)
    kinds = list(dict.fromkeys(map(_kind, names)))
    for text, as_list, shapes in product(TEXTS, (False, True), _shapes(len(kinds))) if names else ():
        shape_of = dict(zip(kinds, shapes, strict=True))
        given = {name: _marked(name, i, shape_of[_kind(name)], as_list) for i, name in enumerate(names)}
        told = {"prompt": text, **asked, **given}
        try:
            out = _as_tuple(pipeline.encode_prompt(**told))
            twice = out if copies is None else _as_tuple(pipeline.encode_prompt(**{**told, copies: 2}))
        except Exception:  # whatever a pipeline's own code raises says that it wants them otherwise
            continue
        return [Returned(_origin(one, names), _grown(one, two)) for one, two in zip(out, twice, strict=True)]
    return None


def _kind(name: str) -> str:
    """What an argument has in common with that of the negative prompt."""
    return name.replace("negative_", "")


def _shapes(count: int) -> list[tuple[tuple[int, ...], ...]]:
    """One for each kind of argument: the same for all first, then one of them unlike the others (HiDream's Llama)."""
    same: list[tuple[tuple[int, ...], ...]] = [(shape,) * count for shape in SHAPES]
    return same + [(PLAIN,) * i + (odd,) + (PLAIN,) * (count - i - 1) for i in range(count) for odd in SHAPES[1:]]


def _takes_embeddings(parameter: inspect.Parameter) -> bool:
    return any(kind in parameter.name for kind in KINDS) and not isinstance(parameter.default, bool)


def _as_tuple(out: Any) -> tuple[Any, ...]:
    return out if isinstance(out, tuple) else (out,)


def _grown(one: Any, two: Any) -> int | None:
    """The axis along which two of it lie."""
    if not isinstance(one, Tensor) or not isinstance(two, Tensor) or one.ndim != two.ndim:
        return None
    return next((axis for axis in range(one.ndim) if two.shape[axis] == 2 * one.shape[axis]), None)


def _marked(name: str, place: int, shape: tuple[int, ...], as_list: bool) -> Any:
    """A mask is known by how many tokens it hides, whatever its type becomes."""
    value = _made(name, _mark(place), shape)
    if "mask" in name:
        value[:, : place + 1] = 0
    return [value[0]] if as_list and value.ndim == 3 else value


def _origin(value: Any, names: list[str]) -> str | None:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    if not isinstance(value, Tensor) or not value.numel() or value.is_meta:
        return None
    kinds = value.unique().tolist()
    marks = [_mark(i) for i in range(len(names))]
    if len(kinds) == 1 and kinds[0] in marks:
        return names[marks.index(kinds[0])]
    hidden = int((value == 0).sum()) - 1
    is_mask = set(kinds) == {0, 1} and hidden in range(len(names)) and "mask" in names[hidden]
    return names[hidden] if is_mask else None
