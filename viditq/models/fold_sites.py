"""Where a scale of a Linear's inputs can be folded into the layer before, by diffusers' class of the denoiser.

A block's own modulation makes x (1 + scale) + shift of a normalized x, scale and shift being rows of one Linear; of a
value projection the output projection sees sums over tokens, channel by channel.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

QKV, ADDED = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")


@dataclass(frozen=True)
class Site:
    """source: the Linear whose rows take the scale, in chunks as wide as the readers' inputs. readers: all Linears that
    read what it makes. shift, scale: which chunks; both None = all of its rows, a value projection.
    """

    source: str
    readers: tuple[str, ...]
    shift: int | None = None
    scale: int | None = None


@dataclass(frozen=True)
class Modulation:
    """Within a block: a Linear of so many chunks, and what reads (shift, scale) of them."""

    source: str
    chunks: int
    reads: tuple[tuple[int, int, tuple[str, ...]], ...]


DOUBLE = "transformer_blocks"
JOINT = (
    Modulation("norm1.linear", 6, ((0, 1, QKV), (3, 4, ("ff.net.0.proj",)))),
    Modulation("norm1_context.linear", 6, ((0, 1, ADDED), (3, 4, ("ff_context.net.0.proj",)))),
)
SINGLE = Modulation("norm.linear", 3, ((0, 1, (*QKV, "proj_mlp")),))
DUAL_QKV = ("attn2.to_q", "attn2.to_k", "attn2.to_v")
SD3 = (
    *JOINT,
    Modulation("norm1.linear", 9, ((0, 1, QKV), (3, 4, ("ff.net.0.proj",)), (6, 7, DUAL_QKV))),
    Modulation("norm1_context.linear", 2, ((1, 0, ADDED),)),  # of the last block, whose text ends in attention
)
QWEN = (
    Modulation("img_mod.1", 6, ((0, 1, QKV), (3, 4, ("img_mlp.net.0.proj",)))),
    Modulation("txt_mod.1", 6, ((0, 1, ADDED), (3, 4, ("txt_mlp.net.0.proj",)))),
)
FLUX = {DOUBLE: JOINT, "single_transformer_blocks": (SINGLE,)}
MODULATED: Mapping[str, Mapping[str, tuple[Modulation, ...]]] = {
    "FluxTransformer2DModel": FLUX,
    "HunyuanVideoTransformer3DModel": FLUX,
    "QwenImageTransformer2DModel": {DOUBLE: QWEN},
    "SD3Transformer2DModel": {DOUBLE: SD3},
}
# attention over one stream alone: in a joint one two output projections would have to share a scale
VALUES = {"SD3Transformer2DModel": (("attn2.to_v", "attn2.to_out.0"),)}


def fold_sites(denoiser: str, shapes: Mapping[str, tuple[int, int]]) -> list[Site]:
    """All of a denoiser; none for a class whose blocks share a modulation, or that is not known.

    shapes: Linear -> (out_features, in_features).
    """
    found = []
    for blocks, modulations in MODULATED.get(denoiser, {}).items():
        places = dict.fromkeys(m[1] for name in shapes if (m := re.match(rf"({re.escape(blocks)}\.\d+)\.", name)))
        for place in places:
            found += [site for m in modulations for site in _of(m, place, shapes)]
            for source, reader in VALUES.get(denoiser, ()):
                if f"{place}.{source}" in shapes:
                    found.append(Site(f"{place}.{source}", (f"{place}.{reader}",)))
    return found


def _of(modulation: Modulation, place: str, shapes: Mapping[str, tuple[int, int]]) -> list[Site]:
    source, found = f"{place}.{modulation.source}", []
    for shift, scale, readers in modulation.reads:
        names = tuple(f"{place}.{reader}" for reader in readers if f"{place}.{reader}" in shapes)
        if source in shapes and names and shapes[source][0] == modulation.chunks * shapes[names[0]][1]:
            found.append(Site(source, names, shift, scale))
    return found
