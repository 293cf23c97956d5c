"""AdaRound of all Linears of a block together, on the block's output (BRECQ, arXiv 2102.05426; Q-Diffusion).

The spec alone; the learning is in viditq.quant.reconstruction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from viditq.errors import UserError
from viditq.quant.description.fields import is_int
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.registry import ROUNDINGS
from viditq.quant.description.specs import RoundingSpec
from viditq.quant.methods.quantizer import Grid, QuantizedWeight, quantize_weight
from viditq.quant.methods.rounding.adaround import AdaRound


@ROUNDINGS.register("block_adaround")
@dataclass(frozen=True)
class BlockAdaRound(RoundingSpec):
    """layer_iterations: of AdaRound of each weight by itself, the start. strength: lambda.

    iterations, learning_rate: of Adam on the block, for each set of weights that segments have of their own. tokens: of
    the inputs of one iteration, about. learn_activation_scale: static activation scales are learned as well
    (LSQ). Linears outside blocks get `AdaRound` with its own defaults.
    """

    name: ClassVar[str] = "block_adaround"
    needs_moments: ClassVar[bool] = True
    learns_blocks: ClassVar[bool] = True

    iterations: int = 100
    tokens: int = 256
    layer_iterations: int = 200
    learning_rate: float = 0.1
    strength: float = 10.0
    learn_activation_scale: bool = False

    def __post_init__(self) -> None:
        AdaRound(self.iterations, self.learning_rate, self.strength)  # refuses what it refuses
        for field in ("tokens", "layer_iterations"):
            value = getattr(self, field)
            if not is_int(value) or value < 1:
                raise UserError(f"{field}={value!r} is not possible: give a whole number from 1, such as 200")
        if not isinstance(self.learn_activation_scale, bool):
            raise UserError(f"learn_activation_scale={self.learn_activation_scale!r} must be true or false")

    def quantize(self, weight_OC: Tensor, spec: QuantSpec, grid: Grid, moments_CC: Any) -> QuantizedWeight:
        """Where learning starts from in a block (no moments), or AdaRound of a Linear by itself."""
        if moments_CC is None:
            return quantize_weight(weight_OC, spec, grid)
        return AdaRound().quantize(weight_OC, spec, grid, moments_CC)
