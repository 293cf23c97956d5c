"""Where the rows of a file's tensors go: by diffusers' own names, our tables of releases, or diffusers' converters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from viditq.export.release_extras import left_out_of
from viditq.export.release_names import Origin
from viditq.export.releases import RELEASES
from viditq.importing.converters import converted, has_converter
from viditq.importing.denoiser import check_names

PREFIX = "model.diffusion_model."


class Rows(NamedTuple):
    """Which rows of a tensor are a part's; swapped: its halves change places first. shape: of the part, if another."""

    first: int
    end: int
    swapped: bool = False
    shape: tuple[int, ...] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """A view where nothing is swapped."""
        if self.swapped:  # bytes: torch joins no 8-bit floating-point numbers on all devices
            raw = tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor
            tensor = torch.cat(raw.chunk(2)[::-1]).view(tensor.dtype)
        rows = tensor[self.first : self.end] if tensor.ndim else tensor
        return rows if self.shape is None else rows.reshape(self.shape)


def without_prefix(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Those of the denoiser; and the names of what a checkpoint of a whole pipeline has beside it."""
    if not any(name.startswith(PREFIX) for name in tensors):
        return dict(tensors), []
    mine = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    return mine, [name for name in tensors if not name.startswith(PREFIX)]


def origins_of(denoiser: nn.Module, tensors: Mapping[str, Tensor], program: str) -> tuple[dict[str, Origin], list[str]]:
    """Name in the file -> where its rows go, and the names that are no part of a denoiser.

    tensors: of the file, weights and biases alone. Raises UserError where they are not those of this class.
    """
    kind, names = type(denoiser).__name__, [*denoiser.state_dict()]
    own = all(name in tensors for name in names)
    if not own and kind not in RELEASES and has_converter(denoiser):
        return converted(denoiser, tensors)
    what = f"{kind} of {program}"
    if own or kind not in RELEASES:
        origins = {name: Origin((name,)) for name in names}
        what += "" if kind in RELEASES or has_converter(denoiser) else " under diffusers' names, the only ones known"
    else:
        origins = RELEASES[kind].origins(names)
    extras = [name for name in tensors if name in left_out_of(kind)]
    check_names([name for name in tensors if name not in extras], [*origins], what)
    return origins, extras


def rows_of(tensor: Tensor, origin: Origin, denoiser: nn.Module) -> dict[str, Rows]:
    """diffusers' name -> its rows. Rows that do not fit are left for the check of shapes."""
    if not origin.names[1:]:
        return {origin.names[0]: Rows(0, len(tensor) if tensor.ndim else 0, origin.swapped, origin.shape)}
    state, parts, first = denoiser.state_dict(), dict[str, Rows](), 0
    for name in origin.names:
        parts[name] = Rows(first, first + len(state[name]), origin.swapped)
        first += len(state[name])
    return parts
