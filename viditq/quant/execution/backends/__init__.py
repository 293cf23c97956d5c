"""Backends: the closed set of ways to multiply."""

from viditq.quant.execution.backends.auto import AutoBackend
from viditq.quant.execution.backends.base import Backend, Unavailable, check_supported, get_backend
from viditq.quant.execution.backends.cuda.backend import CudaBackend
from viditq.quant.execution.backends.fake import FakeBackend
from viditq.quant.execution.backends.native.backend import NativeBackend
from viditq.quant.execution.backends.portable import PortableBackend
from viditq.quant.execution.backends.scaled_mm.backend import ScaledMmBackend
from viditq.quant.execution.backends.triton.backend import TritonBackend
from viditq.quant.execution.backends.weight_only import WeightOnlyBackend

__all__ = [
    "AutoBackend",
    "Backend",
    "CudaBackend",
    "FakeBackend",
    "NativeBackend",
    "PortableBackend",
    "ScaledMmBackend",
    "TritonBackend",
    "Unavailable",
    "WeightOnlyBackend",
    "check_supported",
    "get_backend",
]
