"""Roundings: the closed set of ways a transformed weight becomes codes."""

from viditq.quant.rounding.adaround import AdaRound
from viditq.quant.rounding.block_adaround import BlockAdaRound
from viditq.quant.rounding.gptq import Gptq
from viditq.quant.rounding.nearest import Nearest

__all__ = ["AdaRound", "BlockAdaRound", "Gptq", "Nearest"]
