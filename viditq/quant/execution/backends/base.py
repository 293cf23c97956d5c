"""What multiplies: a Backend turns a Variant's canonical tensors into an output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from viditq.errors import UserError
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.registry import BACKENDS
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.execution.surroundings import NOTHING_AFTER, NOTHING_BEFORE, After, Before
from viditq.quant.execution.variant import Variant
from viditq.quant.numerics.packing import packed_size


class Unavailable(UserError):
    """A backend cannot run on this machine. reason: why, in a few words."""

    def __init__(self, backend: str, reason: str) -> None:
        super().__init__(f"backend {backend} cannot run here: {reason}; choose another backend, or fake")
        self.reason = reason


class Backend(ABC):
    """Chosen when a model is converted or loaded; never stored in the artifact."""

    name: str
    fuses: ClassVar[bool] = False
    """Whether `products` takes fewer passes over memory than its parts one by one."""

    @abstractmethod
    def unsupported_field(self, scheme: LayerScheme) -> str | None:
        """The field of `scheme` that this backend cannot honour, such as "weight.bits"; None = none."""

    def supports(self, scheme: LayerScheme) -> bool:
        """Whether every field of `scheme` is honoured exactly."""
        return self.unsupported_field(scheme) is None

    def resolve(self, scheme: LayerScheme) -> Backend:
        """What multiplies a layer of this scheme: the backend itself, unless it chooses among others."""
        return self

    def check_available(self) -> None:  # noqa: B027 - most have nothing to check
        """Raises Unavailable where this machine cannot run it, before any slow work; builds what has to be built."""

    def weight_bytes(self, scheme: LayerScheme, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Memory of one variant's weight once it is prepared, without transforms and the low-rank branch; here that of
        codes, scales and zero points as they are stored. dtype: of a weight that stays in float.
        """
        spec = scheme.weight
        if spec is None:
            return out_features * in_features * dtype.itemsize
        scales = 1 if spec.granularity == "tensor" else out_features * (in_features // (spec.group_size or in_features))
        whole = 4 if spec.block_scale == "e4m3" else 0
        return out_features * packed_size(in_features, spec.bits) + scales * spec.bytes_per_scale + whole

    @abstractmethod
    def prepare(self, variant: Variant) -> None:
        """Derives, once, what `linear` needs; adds nothing to the state dict."""

    @abstractmethod
    def linear(self, variant: Variant, x: Tensor, bias: Tensor | None) -> Tensor:
        """Q_a(chain(x)) Q_w^T + chain(x) (U V)^T + bias: [..., C] -> [..., O]; never writes to `x`."""

    def products(
        self,
        variants: Sequence[Variant],
        x: Tensor,
        biases: Sequence[Tensor | None],
        before: Before = NOTHING_BEFORE,
        after: After = NOTHING_AFTER,
    ) -> list[Tensor]:
        """Linears that read one input, with what stands before and after each: [..., C] -> one [..., O] each."""
        y = before.apply(x)
        pairs = zip(variants, biases, strict=True)
        return [after.apply(self.linear(variant, y, bias)) for variant, bias in pairs]


def get_backend(name: str) -> Backend:
    """A backend by name; raises UserError with the known names."""
    return BACKENDS.get(name)()


def check_supported(backend: Backend, layer: str, scheme: LayerScheme) -> None:
    """Raises UserError naming the layer and the field."""
    field = backend.unsupported_field(scheme)
    if field is not None:
        value: object = scheme
        for part in field.split("."):
            value = getattr(value, part)
        told = f"{value.label} by {value.granularity}" if isinstance(value, QuantSpec) else repr(value)
        raise UserError(
            f"backend {backend.name} cannot run {layer}: it does not support {field}={told}; "
            "choose another format or backend=fake"
        )
