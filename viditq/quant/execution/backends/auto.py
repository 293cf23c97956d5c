"""The default: for each layer the fastest backend that computes its scheme exactly on this machine."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from viditq.quant.description.registry import BACKENDS
from viditq.quant.description.scheme import LayerScheme, QuantSpec
from viditq.quant.execution.backends.base import Backend, Unavailable
from viditq.quant.execution.variant import Variant

logger = logging.getLogger("viditq")
FASTEST_FIRST = ("native", "portable")


@BACKENDS.register("auto")
class AutoBackend(Backend):
    """Chooses by scheme, and says once for each kind of layer what it took and why nothing faster."""

    name = "auto"

    def unsupported_field(self, scheme: LayerScheme) -> str | None:
        return None

    def resolve(self, scheme: LayerScheme) -> Backend:
        return first_that_takes(scheme, FASTEST_FIRST) if scheme.quantizes else _backend("fake")

    def weight_bytes(self, scheme: LayerScheme, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        return self.resolve(scheme).weight_bytes(scheme, out_features, in_features, dtype)

    def prepare(self, variant: Variant) -> None:
        self.resolve(variant.scheme).prepare(variant)

    def linear(self, variant: Variant, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.resolve(variant.scheme).linear(variant, x, bias)


@cache
def _backend(name: str) -> Backend:
    return BACKENDS.get(name)()


def why_unavailable(backend: Backend) -> str | None:
    """Why it cannot run on this machine, in a few words; None = it can. May build or try something, once."""
    try:
        backend.check_available()
    except Unavailable as error:
        return error.reason
    return None


@cache
def first_that_takes(scheme: LayerScheme, names: tuple[str, ...]) -> Backend:
    """The first of these backends that takes `scheme` and runs here, else one that emulates; says so once."""
    reasons: list[str] = []
    last = "weight_only" if scheme.activation is None else "fake"  # which takes every scheme, as fake does these
    for backend in map(_backend, (*names, last)):
        field = backend.unsupported_field(scheme)
        reason = f"it does not take {field}" if field is not None else why_unavailable(backend)
        if reason is None:
            _tell(_kind(scheme), backend.name, "; ".join(reasons))
            return backend
        reasons.append(f"not {backend.name}: {reason}")
    raise AssertionError(f"{last} takes every such scheme")


@cache
def _tell(kind: str, name: str, reasons: str) -> None:
    logger.info("%s: %s%s", kind, name, f" ({reasons})" if reasons else "")


def _kind(scheme: LayerScheme) -> str:
    """Such as "W4 channel, A8 token, smooth"."""
    chain = "".join(f", {transform.name}" for transform in scheme.transforms)
    branch = f", low rank {scheme.low_rank}" if scheme.low_rank is not None else ""
    return f"{_format('W', scheme.weight)}, {_format('A', scheme.activation)}{chain}{branch}"


def _format(side: str, spec: QuantSpec | None) -> str:
    if spec is None:
        return f"{side} float"
    group = "" if spec.group_size is None else f" {spec.group_size}"
    static = " static" if side == "A" and not spec.dynamic else ""
    return f"{side}{spec.label} {spec.granularity}{group}{static}{' symmetric' if spec.symmetric else ''}"
