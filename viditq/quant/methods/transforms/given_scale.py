"""A scale of inputs that another program's file had (X' = X / s, W' = W s): it travels with codes that were imported.

Nothing is fitted, and so no statistics are asked for where such codes are loaded or judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.quant.description.registry import TRANSFORMS
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.description.specs import TransformSpec
from viditq.quant.methods.transforms.smooth import Smooth


@TRANSFORMS.register("given_scale")
@dataclass(frozen=True)
class GivenScaleSpec(TransformSpec):
    """Describes a Smooth whose scale is stored beside codes that another program made."""

    name: ClassVar[str] = "given_scale"

    def fit(self, weight_OC: Tensor, stats: Any, scheme: LayerScheme) -> NoReturn:
        """Raises UserError: there is nothing to fit it to."""
        raise UserError(
            "given_scale stands for a scale that came with another program's codes, and cannot be made anew. Quantize "
            "with quant/smoothing=static instead; or judge the codes as they are, with quant/policy=artifact."
        )

    def empty(self, in_features: int) -> Smooth:
        return Smooth(torch.empty(in_features, device="meta"))
