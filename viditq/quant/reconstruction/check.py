"""Whether a block gives for one element of a batch what it gives for it in the batch: only then can inputs be kept."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from viditq.errors import UserError
from viditq.quant.reconstruction.batches import outputs
from viditq.quant.reconstruction.calls import Share, Stored, joined

TOLERANCE = 0.03  # of the norm: inputs are kept in 16 bits, and models compute in bfloat16


@torch.no_grad()
def check_alone(block: str, module: nn.Module, share: Share, output: Any) -> None:
    """share: of element 0. output: of the whole batch. Raises UserError where the two disagree.

    Offloaded modules, whose weights are elsewhere, are taken on trust.
    """
    if any(hasattr(part, "_hf_hook") for part in module.modules()):
        return
    alone = _without_hooks(module)
    stored = Stored.of(share.tensors, share.meta)
    args, kwargs = joined([(stored, torch.arange(stored.rows))], None, next(module.parameters()).device)
    try:
        found = outputs(alone(*args, **kwargs))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise _refusal(block, f" ({error})") from error
    pairs = [*zip(found, outputs(output), strict=False)]
    if len(found) != len(outputs(output)) or not all(_agree(one, whole) for one, whole in pairs):
        raise _refusal(block)


def _without_hooks(module: nn.Module) -> nn.Module:
    """A copy that nobody observes."""
    alone = copy.deepcopy(module)
    for part in alone.modules():
        part._forward_pre_hooks.clear()
        part._forward_hooks.clear()
    return alone


def _agree(one: Tensor, whole: Tensor) -> bool:
    """Whether `one` is the beginning of `whole`."""
    first = whole[: len(one)].float()
    return first.shape == one.shape and bool((one.float() - first).norm() <= TOLERANCE * first.norm())


def _refusal(block: str, cause: str = "") -> UserError:
    return UserError(
        f"block {block} does not give for one element of a batch what it gives for it in the batch{cause}, so that it "
        "cannot be reconstructed on inputs kept one by one. Use quant/rounding=adaround, which goes layer by layer."
    )
