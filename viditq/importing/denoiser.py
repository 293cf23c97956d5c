"""One denoiser as another program's file holds it, under the names that it has in diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.importing.layer import ImportedLayer
from viditq.models.mapped_weights import run_dtypes

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ImportedDenoiser:
    """layers: Linear -> its codes. floats: of everything else, in the types of the file, mapped from it. program: that
    the file was made for. left_out: names in the file that are no part of a denoiser.
    """

    program: str
    layers: Mapping[str, ImportedLayer]
    floats: Mapping[str, Tensor]
    left_out: Sequence[str] = ()

    def put_into(self, denoiser: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Give a denoiser, as it was built, the floats; returns name -> the type that it runs in, where that differs.

        dtype: that the denoiser computes in. Raises UserError where the file's floats are not the model's.
        """
        wanted = denoiser.state_dict()
        for name, tensor in self.floats.items():
            check_float(name, tensor.dtype, tensor.shape, wanted[name].shape)
        denoiser.load_state_dict(dict(self.floats), strict=False, assign=True)
        quantized = {f"{layer}.weight": denoiser.get_submodule(layer).weight for layer in self.layers}
        return run_dtypes(denoiser, {**self.floats, **quantized}, dtype)  # type: ignore[dict-item]


def check_float(name: str, dtype: torch.dtype, shape: Sequence[int], wanted: Sequence[int]) -> None:
    """Raises UserError where a tensor of a file holds no plain numbers, or is not of the shape that the model has."""
    if dtype not in FLOATS:
        kind = str(dtype).removeprefix("torch.")
        raise UserError(
            f"{name} is {kind} in the file and is not marked as quantized: what its numbers stand for is not "
            "known. Imported are marked integer codes, and float32, bfloat16 or float16 beside them."
        )
    if tuple(shape) != tuple(wanted):
        raise UserError(
            f"{name} has the shape {[*shape]} in the file and {[*wanted]} in the model: the "
            "file is of another model, or of another size of it; give that one (--model)"
        )


def check_names(found: Sequence[str], wanted: Sequence[str], what: str) -> None:
    """Raises UserError where a file's names are not those of a model. what: the model."""
    there, known = set(found), set(wanted)
    missing, unknown = [n for n in wanted if n not in there], [n for n in found if n not in known]
    if not missing and not unknown:
        return
    said = [f"has no {missing[0]} ({len(missing)} in all)" if missing else ""]
    said += [f"has {unknown[0]} ({len(unknown)} in all), which the model has not" if unknown else ""]
    raise UserError(
        f"the file is no {what}: it {' and '.join(filter(None, said))}. Give the model that it was made from (--model)."
    )
