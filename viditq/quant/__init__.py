"""Quantization of any nn.Module's Linears; needs torch and safetensors only."""

from viditq.quant.artifact import load_denoiser, size_bytes
from viditq.quant.artifact_writer import save_denoiser
from viditq.quant.calibration.calibrator import Calibrator
from viditq.quant.calibration.context import StepContext
from viditq.quant.calibration.segment_stats import SegmentStats
from viditq.quant.calibration.statistics import CalibrationStats
from viditq.quant.convert import build_quantized, quantize_denoiser
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.recipe import Recipe, Rule
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.description.specs import RangeSpec, RoundingSpec, TransformSpec
from viditq.quant.diagnosis.diagnosis import Diagnosis
from viditq.quant.execution.backends import Backend, get_backend
from viditq.quant.execution.linear import QuantLinear
from viditq.quant.execution.model_linears import linear_names
from viditq.quant.execution.variant import Variant
from viditq.quant.methods.ranges import GridFit, LpSearch, MinMax, NormalSteps, Percentile
from viditq.quant.methods.rounding import AdaRound, BlockAdaRound, Gptq, Nearest
from viditq.quant.methods.transforms import (
    Chain,
    ConvRot,
    ConvRotSpec,
    FoldableSpec,
    Rotate,
    RotateSpec,
    SalienceSpec,
    Smooth,
    SmoothSpec,
    Transform,
)
from viditq.quant.reconstruction.collect import BlockInputs
from viditq.quant.reconstruction.learn import BlockReconstruction
from viditq.quant.reconstruction.store import BlockStore

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
    "ConvRot",
    "ConvRotSpec",
    "Diagnosis",
    "FoldableSpec",
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
