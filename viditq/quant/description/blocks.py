"""Blocks of a denoiser, told from the names of its Linears."""

import re
from collections.abc import Iterable

BLOCK = re.compile(r"(.*?\.\d+)(?:\.|$)")  # up to the first number in a module's name


def block_of(layer: str) -> str:
    """`transformer_blocks.3` of `transformer_blocks.3.attn1.to_q`; a layer outside numbered blocks is its own block."""
    found = BLOCK.match(layer)
    return found[1] if found else layer


def in_block(layer: str) -> bool:
    """Whether the layer is a part of a numbered block."""
    return block_of(layer) != layer


def by_block(layers: Iterable[str]) -> dict[str, list[str]]:
    """Block -> those of these layers that are parts of it, in their order; layers outside blocks are left out."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        if in_block(layer):
            found.setdefault(block_of(layer), []).append(layer)
    return found
