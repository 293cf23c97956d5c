"""Ranges: the closed set of ways to lay a grid over values."""

from viditq.quant.methods.ranges.activation import static_grid
from viditq.quant.methods.ranges.grid_fit import GridFit
from viditq.quant.methods.ranges.min_max import MinMax, Percentile
from viditq.quant.methods.ranges.normal_steps import NormalSteps
from viditq.quant.methods.ranges.search import LpSearch

__all__ = ["GridFit", "LpSearch", "MinMax", "NormalSteps", "Percentile", "static_grid"]
