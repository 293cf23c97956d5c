"""What each backend would hold and take: bytes of the quantized denoiser in memory, seconds of a step."""

from __future__ import annotations

from dataclasses import dataclass

from viditq.errors import UserError
from viditq.quant.description.plan import QuantPlan
from viditq.quant.description.registry import BACKENDS
from viditq.quant.execution.backends import check_supported, get_backend


@dataclass(frozen=True)
class Held:
    """A denoiser in memory: its bytes, seconds of a forward (None = not timed); why: what keeps a backend from it."""

    nbytes: int
    seconds: float | None = None
    why: str = ""


def refusals(plan: QuantPlan) -> dict[str, Held]:
    """Every backend, with the first layer and field that it cannot honour; bytes are yet to be counted."""
    return {name: Held(0, why=_refusal(name, plan)) for name in BACKENDS.names()}


def _refusal(name: str, plan: QuantPlan) -> str:
    backend = get_backend(name)
    try:
        for layer in plan.layers:
            for segment in range(plan.num_segments):
                if (scheme := plan.scheme(layer, segment)) is not None:
                    check_supported(backend, layer, scheme)
    except UserError as error:
        return str(error)
    return ""
