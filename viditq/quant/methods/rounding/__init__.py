"""Roundings: the closed set of ways a transformed weight becomes codes."""

from viditq.quant.methods.rounding.adaround import AdaRound
from viditq.quant.methods.rounding.block_adaround import BlockAdaRound
from viditq.quant.methods.rounding.gptq import Gptq
from viditq.quant.methods.rounding.nearest import Nearest

__all__ = ["AdaRound", "BlockAdaRound", "Gptq", "Nearest"]
