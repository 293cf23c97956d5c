"""What all fused blocks share: when they step aside, and the check against the plain block."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from viditq.on_disk import is_visit
from viditq.quant.execution.linear import QuantLinear

logger = logging.getLogger("viditq")
# Of what the block adds to its input. Both paths multiply the same codes but where rounding differs before the
# quantizer, which moves a value by one step now and then; a part that was forgotten is wrong by tens of percent.
TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.05, torch.float16: 0.05}


@dataclass
class Fusion:
    """Of all blocks of one class in a denoiser. checked: kinds of calls that agreed; off: why they run plainly."""

    name: str
    checked: set[Any] = field(default_factory=set)
    off: str | None = None

    def step_aside(self, reason: str) -> None:
        """From now on the plain forward; says so once."""
        if self.off is None:
            logger.info("%s runs unfused: %s", self.name, reason)
        self.off = reason


class FusedBlock:
    """Mixin before a block's own class; an instance is a block whose class was replaced, with all its modules.

    Subclasses give `reason_against` (of the structure), `unknown_call` (of the arguments) and `fused`, which takes the
    block's own arguments and returns what its `forward` would.
    """

    fusion: Fusion

    @classmethod
    def reason_against(cls, block: Any) -> str | None:
        """What of this block's structure the adapter does not know; None = nothing."""
        raise NotImplementedError

    def unknown_call(self, *args: Any, **kwargs: Any) -> str | None:
        """What of these arguments it does not know; None = nothing."""
        raise NotImplementedError

    def fused(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output in few passes."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the plain block; which is what runs where hooks watch a part of it, and where the adapter steps aside."""
        state = self.fusion
        if state.off is not None or self._is_watched():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        reason = self.unknown_call(*args, **kwargs)
        if reason is not None:
            state.step_aside(reason)
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        out = self.fused(*args, **kwargs)
        if torch.compiler.is_compiling():
            return out
        kind = (_first(out).dtype, *[value is None for value in (*args, *kwargs.values())])
        if kind in state.checked:
            return out
        plain = super().forward(*args, **kwargs)  # type: ignore[misc]
        error = disagreement(out, plain, [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)])
        if not error <= TOLERANCE[_first(out).dtype]:
            state.step_aside(f"it differs from the plain block by {error:.2g} of what the block adds")
            return plain
        state.checked.add(kind)
        return out

    def _is_watched(self) -> bool:
        """Observers and offloading hang hooks on modules, which a fused block does not call."""
        assert isinstance(self, nn.Module)
        found = list(self._modules.values())
        for module in found:  # which grows; at every call, so without the generators of `modules`
            if module is None:
                continue
            own = module.__dict__
            if "_hf_hook" in own:
                return True
            if own["_forward_pre_hooks"] or own["_forward_hooks"]:
                hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
                if not all(map(is_visit, hooks)):
                    return True
            if own["_modules"] and not isinstance(module, QuantLinear):  # what it holds is never called
                found += own["_modules"].values()
        return False


def _first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


@torch.no_grad()
def disagreement(fused: Any, plain: Any, inputs: list[Tensor]) -> float:
    """The largest ||fused - plain|| / ||plain - input|| over the outputs (/ ||plain|| where no input has its shape).

    Less what rounding the sums to their type makes of it: a block may add so little that this alone is a tenth.
    """
    pairs = [(fused, plain)] if isinstance(plain, Tensor) else list(zip(fused, plain, strict=True))
    errors = []
    for mine, theirs in pairs:
        sources = [x for x in inputs if x.shape == theirs.shape and x.dtype == theirs.dtype]
        changes = [float((theirs.float() - x.float()).norm()) for x in sources] or [float(theirs.float().norm())]
        rounding = torch.finfo(theirs.dtype).eps / 8 * float(theirs.float().norm())
        difference = max(float((mine.float() - theirs.float()).norm()) - rounding, 0.0)
        errors.append(difference / min(changes) if min(changes) > 0 else float(difference > 0))
    return max(errors)


def all_fusible(block: nn.Module, linears: list[nn.Module]) -> str | None:
    """Why some of `linears` cannot be part of a fused block; None = all can."""
    names = {module: name for name, module in block.named_modules()}
    for linear in linears:
        if not isinstance(linear, QuantLinear):
            return f"{names[linear]} is kept in float"
        if not linear.fuses:
            return f"{names[linear]} is multiplied by {linear.backend_names}"
    return None
