"""Transforms: the closed set that a scheme may name."""

from viditq.quant.transforms.base import Chain, Transform
from viditq.quant.transforms.smooth import Smooth, SmoothSpec

__all__ = ["Chain", "Smooth", "SmoothSpec", "Transform"]
