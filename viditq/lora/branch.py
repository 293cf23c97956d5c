"""The branch of one LoRA beside one Linear.

Legend: O out_features, C in_features, r rank.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear as multiply

from viditq.hooks import Hook, add_hook
from viditq.lora.files import Update
from viditq.quant.execution.linear import QuantLinear


class LoraBranch:
    """Adds scale * B A x to what a Linear returns. Its tensors are buffers of the Linear, so that they move with it."""

    def __init__(self, name: str, scale: float) -> None:
        self.name, self.scale = name, scale

    @property
    def buffers(self) -> tuple[str, str]:
        """Of A and B."""
        return f"lora_{self.name}_down", f"lora_{self.name}_up"

    def add(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """A forward hook."""
        down_rC, up_Or = (getattr(module, buffer) for buffer in self.buffers)
        return out + self.scale * multiply(multiply(args[0].to(down_rC.dtype), down_rC), up_Or).to(out.dtype)


def attach(linear: QuantLinear | nn.Linear, name: str, update: Update, scale: float) -> None:
    """Let `linear` add an update from now on, in the type that it computes in."""
    branch = LoraBranch(name, scale)
    dtype = linear.dtype if isinstance(linear, QuantLinear) else linear.weight.dtype
    like = next(t for t in (*linear.parameters(), *linear.buffers()) if not t.is_meta)
    for buffer, part in zip(branch.buffers, (update.down_rC, update.up_Or), strict=True):
        linear.register_buffer(buffer, part.to(like.device, dtype), persistent=False)
    add_hook(linear.register_forward_hook, branch.add)


def branches(module: nn.Module) -> list[LoraBranch]:
    """Those beside `module`."""
    owners = (getattr(hook.function, "__self__", None) for hook in _hooks(module).values())
    return [owner for owner in owners if isinstance(owner, LoraBranch)]


def detach(module: nn.Module, branch: LoraBranch) -> None:
    """The opposite of `attach`."""
    for number, hook in _hooks(module).items():
        if getattr(hook.function, "__self__", None) is branch:
            del module._forward_hooks[number]
    for buffer in branch.buffers:
        delattr(module, buffer)


def _hooks(module: nn.Module) -> dict[int, Hook]:
    return {number: hook for number, hook in module._forward_hooks.items() if isinstance(hook, Hook)}
