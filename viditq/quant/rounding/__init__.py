"""Roundings: how a transformed weight becomes codes."""

from viditq.quant.rounding.nearest import nearest

__all__ = ["nearest"]
