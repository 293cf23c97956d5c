"""Puts the adapters in place of a denoiser's blocks."""

from __future__ import annotations

from collections import Counter

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import nn

from viditq.fusion.basic_block import FusedBasicBlock
from viditq.fusion.block import FusedBlock, Fusion, logger
from viditq.fusion.flux_blocks import FusedFluxBlock, FusedFluxSingleBlock
from viditq.fusion.patches import FusedPatches2d, FusedPatches3d, cuts_patches
from viditq.fusion.stdit_block import FusedStditBlock
from viditq.fusion.wan_block import FusedWanBlock
from viditq.models.stdit_blocks import Block
from viditq.quant.execution.linear import quant_linears

ADAPTERS: dict[type[nn.Module], type[FusedBlock]] = {
    BasicTransformerBlock: FusedBasicBlock,
    Block: FusedStditBlock,
    WanTransformerBlock: FusedWanBlock,
    FluxTransformerBlock: FusedFluxBlock,
    FluxSingleTransformerBlock: FusedFluxSingleBlock,
}
PATCHES: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: FusedPatches2d, nn.Conv3d: FusedPatches3d}


def fuse_blocks(denoiser: nn.Module) -> dict[str, int]:
    """Let every block that an adapter knows run fused from now on; how many, by class. What makes patches follows.

    A block changes its class and keeps its modules and their names, so that it is saved, copied and watched as before.
    Blocks that an adapter does not know in full stay as they are; one line says why. Where nothing fuses (emulation),
    there is nothing to do.
    """
    if not any(linear.fuses for linear in quant_linears(denoiser).values()):
        return {}
    fused: Counter[str] = Counter()
    reasons: Counter[tuple[str, str]] = Counter()
    shared: dict[str, Fusion] = {}
    for block in denoiser.modules():
        adapter = ADAPTERS.get(type(block))
        if adapter is None:
            continue
        name = type(block).__name__
        reason = adapter.reason_against(block)
        if reason is not None:
            reasons[name, reason] += 1
            continue
        block.__class__ = adapter  # type: ignore[assignment]
        block.fusion = shared.setdefault(name, Fusion(name))  # type: ignore[assignment]
        fused[name] += 1
    for module in denoiser.modules() if fused else ():
        if cuts_patches(module):
            module.__class__ = PATCHES[type(module)]  # type: ignore[assignment]
    for (name, reason), count in reasons.items():
        logger.info("%d of %s run unfused: %s", count, name, reason)
    return dict(fused)


def unfuse_blocks(denoiser: nn.Module) -> None:
    """Every block runs as its own class again."""
    plain: dict[type, type[nn.Module]] = {fused: own for own, fused in (*ADAPTERS.items(), *PATCHES.items())}
    for module in denoiser.modules():
        if type(module) in plain:
            module.__class__ = plain[type(module)]  # type: ignore[assignment]
            vars(module).pop("fusion", None)
