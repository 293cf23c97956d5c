"""Which rows of an original release's tensors each of diffusers' is made of, by diffusers' own converter.

The converter is shown the rows' numbers in place of weights: what it returns tells where they go, and the weights, of
whatever type, stay in their file.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.export.release_names import Origin
from viditq.importing.denoiser import check_names

CONVERTER = "checkpoint_mapping_fn"
MOST_NUMBERS = 2**20  # of what is numbered one by one
MADE_ANEW = {"WanAnimateTransformer3DModel": [r"^motion_encoder\..*\.kernel$"]}  # blur filters, which are no weights


@dataclass(frozen=True)
class Units:
    """The numbers start .. start + count - 1 that stand for a tensor's rows, or for all that is in it."""

    name: str
    start: int
    count: int
    whole: bool


@dataclass(frozen=True)
class Piece:
    """Where a tensor of diffusers' is from: which units of its source, in turn, and the shape that they have."""

    name: str
    units: Tensor
    shape: tuple[int, ...]


def has_converter(denoiser: nn.Module) -> bool:
    """Whether diffusers converts original releases of this class."""
    return type(denoiser).__name__ in SINGLE_FILE_LOADABLE_CLASSES


def converted(denoiser: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Origin], list[str]]:
    """Name in the file -> where its rows go, and the names that the converter leaves out.

    Raises UserError where the file is not of this class, or has what the converter does not know.
    """
    settings: Any = denoiser.config
    kind, numbered, sources = type(denoiser).__name__, dict[str, Tensor](), list[Units]()
    for name, tensor in tensors.items():
        start = sources[-1].start + sources[-1].count if sources else 0
        numbered[name], units = _numbered(name, tensor, start)
        sources.append(units)
    try:
        found = SINGLE_FILE_LOADABLE_CLASSES[kind][CONVERTER](checkpoint=numbered, config={**settings})
    except (KeyError, IndexError, ValueError, RuntimeError) as error:  # they ask for each name, and for sizes
        raise UserError(
            f"the file is no {kind} of its original release: diffusers' converter cannot read it "
            f"({type(error).__name__}: {error}). Give the model that it was made from (--model)."
        ) from error
    unread = [] if found is numbered else [*numbered]  # what is read is taken out
    found = {n: numbers for n, numbers in found.items() if not (numbers is None or _ignored(denoiser, n))}
    found = {n: numbers for n, numbers in found.items() if numbers.numel()}  # a tensor of no rows is none
    check_names([*found, *unread], [*denoiser.state_dict()], f"{kind} of its original release")
    pieces: dict[str, list[Piece]] = {}
    for name, numbers in found.items():
        source = sources[bisect_right(sources, int(numbers.flatten()[0]), key=lambda units: units.start) - 1]
        units = numbers.flatten() - source.start
        pieces.setdefault(source.name, []).append(Piece(name, units, tuple(numbers.shape)))
    origins = {units.name: _origin(units, pieces[units.name], tensors) for units in sources if units.name in pieces}
    return origins, [name for name in tensors if name not in origins]


def _numbered(name: str, tensor: Tensor, start: int) -> tuple[Tensor, Units]:
    """A number for each row, or, where there is one row at most, for each number in it (unless it is a large one)."""
    whole = tensor.ndim < 2 or (len(tensor) == 1 and tensor.numel() <= MOST_NUMBERS)
    shape = [*tensor.shape] if whole else [len(tensor), *[1] * (tensor.ndim - 1)]
    count = torch.Size(shape).numel()
    return torch.arange(start, start + count).view(shape), Units(name, start, count, whole)


def _ignored(denoiser: nn.Module, name: str) -> bool:
    """Whether diffusers' class does not mind that the file has it."""
    patterns = [*(getattr(denoiser, "_keys_to_ignore_on_load_unexpected", None) or ())]
    patterns += MADE_ANEW.get(type(denoiser).__name__, [])
    return any(re.search(pattern, name) for pattern in patterns)


def _origin(source: Units, pieces: list[Piece], tensors: Mapping[str, Tensor]) -> Origin:
    """Raises UserError where a converter does more than to take rows apart, to swap halves and to give a new shape."""
    pieces = sorted(pieces, key=lambda piece: int(piece.units[0]))
    order, every = torch.cat([piece.units for piece in pieces]), torch.arange(source.count)
    names = tuple(piece.name for piece in pieces)
    if torch.equal(order, every):
        new = source.whole and len(pieces) == 1 and pieces[0].shape != tuple(tensors[source.name].shape)
        return Origin(names, shape=pieces[0].shape if new else None)
    if len(pieces) == 1 and source.count % 2 == 0 and torch.equal(order, every.roll(source.count // 2)):
        return Origin(names, swapped=True)
    raise UserError(
        f"diffusers' converter makes {', '.join(names)} of {source.name} in a way that viditq does not follow. "
        "Load the file with diffusers' from_single_file, save it, and give that folder: model.denoiser_path."
    )
