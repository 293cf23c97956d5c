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
from viditq.quant.ranges import GridFit, LpSearch, MinMax, NormalSteps, Percentile
from viditq.quant.recipe import Recipe, Rule
from viditq.quant.reconstruction.collect import BlockInputs
from viditq.quant.reconstruction.learn import BlockReconstruction
from viditq.quant.reconstruction.store import BlockStore
from viditq.quant.rounding import AdaRound, BlockAdaRound, Gptq, Nearest
from viditq.quant.scheme import LayerScheme, QuantSpec
from viditq.quant.specs import RangeSpec, RoundingSpec, TransformSpec
from viditq.quant.transforms import Chain, Rotate, RotateSpec, SalienceSpec, Smooth, SmoothSpec, Transform

__all__ = [
    "AdaRound",
    "Backend",
    "BlockAdaRound",
    "BlockInputs",
    "BlockReconstruction",
    "BlockStore",
    "CalibrationStats",
    "Calibrator",
    "Chain",
    "Diagnosis",
    "Gptq",
    "GridFit",
    "LayerScheme",
    "LpSearch",
    "MinMax",
    "Nearest",
    "NormalSteps",
    "Percentile",
    "QuantLinear",
    "QuantPlan",
    "QuantSpec",
    "RangeSpec",
    "Recipe",
    "Rotate",
    "RotateSpec",
    "RoundingSpec",
    "Rule",
    "SalienceSpec",
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
    "quantize_denoiser",
    "save_denoiser",
    "size_bytes",
]
