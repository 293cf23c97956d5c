"""A quantized Linear of another program's file: how it is treated, and what an artifact stores of it.

Legend: O out_features, C in_features, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.mapped import is_finite, release
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.numerics.packing import pack

MIDDLE = {bits: 2 ** (bits - 1) for bits in range(2, 9)}  # the code of 0 where there is no zero point


@dataclass(frozen=True)
class ImportedLayer:
    """read: makes the tensors of its variant, by their names there. sources: mapped tensors that it looks at."""

    scheme: LayerScheme
    read: Callable[[], dict[str, Tensor]]
    sources: Sequence[Tensor]

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """What `read` makes; the memory of what it looked at is given back. Raises UserError for NaN or inf in it."""
        made = {name: tensor.contiguous() for name, tensor in self.read().items()}
        bad = next((name for name, tensor in made.items() if not is_finite(tensor)), None)
        if bad is not None:
            raise UserError(f"{bad} of {layer} contains NaN or inf; check the file, or download it again")
        release(self.sources)
        return made


def stored(codes_OC: Tensor, bits: int, scale: Tensor, zero_point: Tensor | None = None) -> dict[str, Tensor]:
    """As a variant stores them. codes_OC: uint8, below 2^bits. scale, zero_point: [O, 1], [O, G, 1] or [1, 1]."""
    tensors = {"qweight": pack(codes_OC, bits), "weight_scale": scale.float()}
    return tensors if zero_point is None else {**tensors, "weight_zero_point": zero_point}


def unsigned(codes: Tensor, bits: int) -> Tensor:
    """int8, from -2^(bits-1) on, as uint8 counted from there; uint8 wraps around, so that nothing wider is made."""
    return codes.view(torch.uint8) + MIDDLE[bits]


def check_shape(name: str, tensor: Tensor, allowed: Sequence[tuple[int, ...]]) -> None:
    """Raises UserError unless the shape is one of these."""
    if tuple(tensor.shape) not in allowed:
        shapes = " or ".join(str([*shape]) for shape in allowed)
        raise UserError(f"{name} has the shape {[*tensor.shape]} in the file; this model's is {shapes}")


def check_fields(layer: str, found: Mapping[str, Tensor], needed: Sequence[str], allowed: Sequence[str] = ()) -> None:
    """Raises UserError where a tensor of a layer is missing, or is not known."""
    absent = [name for name in needed if name not in found]
    if absent:
        raise UserError(f"{layer} is quantized and lacks {layer}.{absent[0]}: the file is not whole; download it again")
    unknown = [name for name in found if name not in (*needed, *allowed)]
    if unknown:
        raise UserError(
            f"{layer}.{unknown[0]} lies beside codes of a format that has no such tensor, so that it is not known what "
            "is computed with it. Only a file whose layers are read in full is imported."
        )
