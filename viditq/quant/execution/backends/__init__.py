"""Backends: the closed set of ways to multiply."""

from viditq.quant.execution.backends.base import Backend, check_supported, get_backend
from viditq.quant.execution.backends.fake import FakeBackend

__all__ = ["Backend", "FakeBackend", "check_supported", "get_backend"]
