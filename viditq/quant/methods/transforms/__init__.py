"""Transforms: the closed set that a scheme may name."""

from viditq.quant.methods.transforms.base import Chain, Transform
from viditq.quant.methods.transforms.convrot import ConvRot, ConvRotSpec
from viditq.quant.methods.transforms.foldable import FoldableSpec
from viditq.quant.methods.transforms.given_scale import GivenScaleSpec
from viditq.quant.methods.transforms.rotate import Rotate, RotateSpec
from viditq.quant.methods.transforms.salience import SalienceSpec
from viditq.quant.methods.transforms.smooth import Smooth, SmoothSpec

__all__ = [
    "Chain",
    "ConvRot",
    "ConvRotSpec",
    "FoldableSpec",
    "GivenScaleSpec",
    "Rotate",
    "RotateSpec",
    "SalienceSpec",
    "Smooth",
    "SmoothSpec",
    "Transform",
]
