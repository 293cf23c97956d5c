"""QuantLinear: a Linear whose weight is stored as codes, once per variant.

Legend: O out_features, C in_features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.quant.calibration.context import StepContext
from viditq.quant.execution.backends.base import Backend
from viditq.quant.execution.residency import Residency
from viditq.quant.execution.surroundings import NOTHING_AFTER, NOTHING_BEFORE, After, Before
from viditq.quant.execution.variant import Variant


class QuantLinear(nn.Module):
    """Drop-in for nn.Linear; the context's segment chooses the variant, the backend multiplies."""

    bias: nn.Parameter | None
    weight = None
    """None for models that look at a Linear's weight before they call it, as T5's mlp does for its type."""

    def __init__(
        self,
        name: str,
        bias: nn.Parameter | None,
        variants: list[Variant],
        segment_to_variant: list[int],
        out_features: int,
        context: StepContext,
        backend: Backend,
    ) -> None:
        super().__init__()
        self.name, self.in_features, self.out_features = name, variants[0].in_features, out_features
        self.variants = nn.ModuleList(variants)
        self.in_order = tuple(variants)
        """The same without the cost of looking a module up, which a small Linear would notice."""
        self.segment_to_variant = segment_to_variant
        self.register_parameter("bias", bias)
        self.context = context
        self.backends = [backend.resolve(variant.scheme) for variant in variants]
        """What multiplies each variant."""
        self.residency: Residency | None = None
        self.stored_name = name
        """In the file that it is made from when it is called, where weights stay on disk (`Residency`)."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the float Linear it stands for."""
        return cast(Variant, self.variants[0]).dtype

    def prepare(self) -> None:
        """Lets the backend derive what it needs from the stored tensors; call once they are real."""
        for backend, variant in zip(self.backends, self.variants, strict=True):
            backend.prepare(cast(Variant, variant))

    def use(self, backend: Backend) -> None:
        """Another backend from now on, which supports all of its schemes."""
        for variant in self.variants:
            cast(Variant, variant).take_back()
        self.backends = [backend.resolve(cast(Variant, variant).scheme) for variant in self.variants]
        self.prepare()

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., O]."""
        index = self.current_index()
        if self.residency is not None:
            self.residency.use([(self, index)])
        return self.backends[index].linear(self.in_order[index], x, self.bias)

    def current_variant(self) -> Variant:
        """Raises UserError when the answer depends on a segment and there is none."""
        return self.in_order[self.current_index()]

    def current_index(self) -> int:
        """Of the variant that the current segment takes; raises as `current_variant`."""
        if len(self.in_order) == 1:
            return 0
        segment = self.context.segment
        if segment is None:
            raise UserError(
                f"{self.name} holds {len(self.in_order)} variants but the noise level is unknown: "
                "call it through its denoiser, which reads the timestep"
            )
        return self.segment_to_variant[segment]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Variants that hold one weight still hold one after a move; what was derived in one type is in another."""
        variants = cast(list[Variant], list(self.variants))
        before, dtype = [variant.held for variant in variants], self.dtype
        super()._apply(fn, recurse)
        for backend, variant in zip(self.backends, variants, strict=True):
            if self.dtype != dtype and variant.has_derived:
                variant.take_back()
                backend.prepare(variant)
        for variant, held in zip(variants, before, strict=True):
            variant.held = variants[next(i for i, other in enumerate(before) if other is held)].held
        return self

    @property
    def fuses(self) -> bool:
        """Whether every variant's backend computes what stands around a product along with it."""
        return all(backend.fuses for backend in self.backends)

    @property
    def backend_names(self) -> str:
        """What multiplies, such as "native", or "fake and native" where variants differ; "float" is left in float."""
        pairs = zip(self.backends, self.variants, strict=True)
        names = {backend.name if cast(Variant, v).scheme.quantizes else "float" for backend, v in pairs}
        return " and ".join(sorted(names))

    def extra_repr(self) -> str:
        names = [cast(Variant, v).scheme for v in self.variants]
        bits = ["/".join(s.label if s else "float" for s in (n.weight, n.activation)) for n in names]
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={bits}"


def quant_linears(denoiser: nn.Module) -> dict[str, QuantLinear]:
    """All QuantLinears by name."""
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, QuantLinear)}


def products(
    linears: Sequence[QuantLinear], x: Tensor, before: Before = NOTHING_BEFORE, after: After = NOTHING_AFTER
) -> list[Tensor]:
    """The outputs of Linears that read one input, with what stands before and after each; see `Backend.products`."""
    calls = [(linear, linear.current_index()) for linear in linears]
    if linears[0].residency is not None:
        linears[0].residency.use(calls)
    backends = [linear.backends[index] for linear, index in calls]
    variants = [linear.in_order[index] for linear, index in calls]
    biases = [linear._parameters["bias"] for linear in linears]  # as `linear.bias`, which costs as much as all of this
    if len(set(backends)) == 1:
        return backends[0].products(variants, x, biases, before, after)
    one_by_one = zip(backends, variants, biases, strict=True)
    return [backend.products([variant], x, [bias], before, after)[0] for backend, variant, bias in one_by_one]


def backend_counts(denoiser: nn.Module) -> dict[str, int]:
    """Name of a backend -> how many QuantLinears it computes; empty where nothing is quantized."""
    return dict(sorted(Counter(layer.backend_names for layer in quant_linears(denoiser).values()).items()))
