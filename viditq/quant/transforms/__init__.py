"""Transforms: the closed set that a scheme may name."""

from viditq.quant.transforms.base import Chain, Transform
from viditq.quant.transforms.rotate import Rotate, RotateSpec
from viditq.quant.transforms.salience import SalienceSpec
from viditq.quant.transforms.smooth import Smooth, SmoothSpec

__all__ = ["Chain", "Rotate", "RotateSpec", "SalienceSpec", "Smooth", "SmoothSpec", "Transform"]
