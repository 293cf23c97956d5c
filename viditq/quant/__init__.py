"""Quantization of any nn.Module's Linears; needs torch and safetensors only."""

from viditq.quant.artifact import load_denoiser, save_denoiser, size_bytes
from viditq.quant.backends import Backend, get_backend
from viditq.quant.calibration import Calibrator
from viditq.quant.context import StepContext
from viditq.quant.convert import build_quantized, linear_names, quantize_denoiser
from viditq.quant.diagnosis import Diagnosis
from viditq.quant.linear import QuantLinear, Variant
from viditq.quant.observers import CalibrationStats, SegmentStats
from viditq.quant.plan import QuantPlan
from viditq.quant.recipe import Recipe, Rule
from viditq.quant.rounding import nearest
from viditq.quant.scheme import LayerScheme, QuantSpec, TransformSpec
from viditq.quant.transforms import Chain, Smooth, SmoothSpec, Transform

__all__ = [
    "Backend",
    "CalibrationStats",
    "Calibrator",
    "Chain",
    "Diagnosis",
    "LayerScheme",
    "QuantLinear",
    "QuantPlan",
    "QuantSpec",
    "Recipe",
    "Rule",
    "SegmentStats",
    "Smooth",
    "SmoothSpec",
    "StepContext",
    "Transform",
    "TransformSpec",
    "Variant",
    "build_quantized",
    "get_backend",
    "linear_names",
    "load_denoiser",
    "nearest",
    "quantize_denoiser",
    "save_denoiser",
    "size_bytes",
]
