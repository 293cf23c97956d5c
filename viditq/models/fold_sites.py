"""Where a scale of a Linear's inputs can be folded into the layer before, by diffusers' class of the denoiser.

A block's own modulation makes x (1 + scale) + shift of a normalized x, scale and shift being rows of one Linear; a
norm's weight is a factor of each channel; of a value projection the output projection sees sums over tokens, channel by
channel; and a gated mlp multiplies one Linear's output into what the last one reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

QKV, ADDED = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")


@dataclass(frozen=True)
class Site:
    """source: the Linear whose rows take the scale, in chunks as wide as the readers' inputs, or a norm. readers: all
    Linears that read what it makes. shift, scale: which chunks; both None = all of its rows.
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
Plain = tuple[str, tuple[str, ...]]
Z_IMAGE: tuple[Plain, ...] = (  # all that it has: its norms have weights of their own, and its mlp is a product
    ("attention_norm1", ("attention.to_q", "attention.to_k", "attention.to_v")),
    ("attention.to_v", ("attention.to_out.0",)),
    ("ffn_norm1", ("feed_forward.w1", "feed_forward.w3")),
    ("feed_forward.w3", ("feed_forward.w2",)),
)
# (source, readers) of which the source takes the scale in all rows. Attention over one stream alone: in a joint one two
# output projections would have to share a scale
PLAIN: Mapping[str, Mapping[str, tuple[Plain, ...]]] = {
    "SD3Transformer2DModel": {DOUBLE: (("attn2.to_v", ("attn2.to_out.0",)),)},
    "ZImageTransformer2DModel": dict.fromkeys(("layers", "noise_refiner", "context_refiner"), Z_IMAGE),
}
KNOWN = sorted({*MODULATED, *PLAIN})


def fold_sites(denoiser: str, shapes: Mapping[str, tuple[int, int]]) -> list[Site]:
    """All of a denoiser; none for a class whose blocks share a modulation, or that is not known.

    shapes: Linear -> (out_features, in_features).
    """
    modulated, plain = MODULATED.get(denoiser, {}), PLAIN.get(denoiser, {})
    found = []
    for blocks in dict.fromkeys([*modulated, *plain]):
        places = dict.fromkeys(m[1] for name in shapes if (m := re.match(rf"({re.escape(blocks)}\.\d+)\.", name)))
        for place in places:
            found += [site for m in modulated.get(blocks, ()) for site in _of(m, place, shapes)]
            for source, readers in plain.get(blocks, ()):
                site = Site(f"{place}.{source}", tuple(f"{place}.{reader}" for reader in readers))
                width = shapes[site.readers[0]][1] if site.readers[0] in shapes else None
                if width is not None and shapes.get(site.source, (width, 0))[0] == width:
                    found.append(site)
    return found


def _of(modulation: Modulation, place: str, shapes: Mapping[str, tuple[int, int]]) -> list[Site]:
    source, found = f"{place}.{modulation.source}", []
    for shift, scale, readers in modulation.reads:
        names = tuple(f"{place}.{reader}" for reader in readers if f"{place}.{reader}" in shapes)
        if source in shapes and names and shapes[source][0] == modulation.chunks * shapes[names[0]][1]:
            found.append(Site(source, names, shift, scale))
    return found
