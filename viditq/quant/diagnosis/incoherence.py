"""Incoherence, amax / mean |x|: how far the largest value sticks out, and what scaling and rotation do about it.

A grid of b bits spans the largest value, so the error of the others grows with it. ViDiT-Q (arXiv 2406.02540) shows one
layer's 40.8 raw, 17.8 scaled, 12.8 rotated and 5.0 with both.

A rotation mixes channels, so what it does to activations cannot be had from the ranges of channels in the statistics:
all four variants are computed on the same kept input rows. Those are a sample (at most `rows_per_bucket` per bucket of
noise levels), so a peak rarer than one row in that many may be missing. The scales do know it: they come from the
largest magnitude of each channel over everything seen. Of a weight beyond SAMPLE elements, rows at equal distances.

Legend: O out_features, C in_features, n rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from viditq.mapped import PIECE_BYTES, release
from viditq.quant.calibration.statistics import CalibrationStats
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.description.scheme import LayerScheme
from viditq.quant.methods.transforms import Chain, RotateSpec, SmoothSpec, Transform

VARIANTS = ("raw", "scaled", "rotated", "both")
SCALE = SmoothSpec(0.5, aggregate="max")
ROTATE = RotateSpec()
SAMPLE = 2**20  # elements of a weight: of twice as many Gaussian ones the largest is 2 % larger
Map = Callable[[Tensor], Tensor]


@dataclass
class Spread:
    """Of numbers that come in pieces: the largest magnitude, the sum of all and how many there are."""

    amax: float = 0.0
    total: float = 0.0
    count: int = 0

    def add(self, x: Tensor, room: Tensor) -> None:
        """Count these in; room: for as many numbers, overwritten."""
        magnitude = torch.abs(x, out=room)
        self.amax = max(self.amax, float(magnitude.amax()))
        self.total += float(magnitude.sum())
        self.count += x.numel()

    @property
    def incoherence(self) -> float:
        """amax / mean |x|: at least 1, 0 for zeros; about 6 for a million Gaussian numbers."""
        return self.amax * self.count / self.total if self.total else 0.0


def incoherence_of(maps: Mapping[str, Map], rows_nC: Tensor) -> dict[str, float]:
    """Of what each of `maps` makes of the rows, a MiB at a time, so that all of it stays in the processor's cache."""
    spreads, size = {name: Spread() for name in maps}, max(PIECE_BYTES // (4 * rows_nC.shape[1]), 1)
    room_nC = torch.empty_like(rows_nC[:size], dtype=torch.float32)
    for piece_nC in rows_nC.split(size):
        piece_nC = piece_nC.float()
        for name, made in maps.items():
            spreads[name].add(made(piece_nC), room_nC[: len(piece_nC)])
    return {name: spread.incoherence for name, spread in spreads.items()}


def incoherence(
    stats: CalibrationStats,
    weights: Mapping[str, Tensor],
    scale: SmoothSpec = SCALE,
    rotate: RotateSpec = ROTATE,
    noise_levels: tuple[float, float] = (0.0, 1.0),
) -> dict[str, dict[str, dict[str, float]]]:
    """{layer: {"activation": {raw, scaled, rotated, both}, "weight": likewise}}, in the order of `weights`.

    weights: layer -> [O, C]. Activations are the kept input rows of `noise_levels`, taken as one tensor. Raises
    UserError for layers without statistics there.
    """
    out: dict[str, dict[str, dict[str, float]]] = {}
    shared: dict[int, dict[str, float]] = {}  # layers that read one input share what no weight has a say in
    scheme = LayerScheme(None, QuantSpec(8, granularity="token", dynamic=True))
    for layer, weight_OC in weights.items():
        segment, observer = stats.segment(layer, *noise_levels), id(stats.layers[layer])
        scaled, rotated = scale.fit(weight_OC, segment, scheme), rotate.fit(weight_OC, None, scheme)
        parts: list[list[Transform]] = [[], [scaled], [rotated], [scaled, rotated]]
        chains = {name: Chain(transforms) for name, transforms in zip(VARIANTS, parts, strict=True)}
        known = shared.get(observer, {})
        new = {name: chain.activation for name, chain in chains.items() if name not in known}
        activation = known | incoherence_of(new, segment.rows.to(weight_OC.device))
        shared[observer] = {name: activation[name] for name in ("raw", "rotated")}
        sample_nC = weight_OC.detach()[:: -(-weight_OC.numel() // SAMPLE)]
        out[layer] = {
            "activation": {name: activation[name] for name in VARIANTS},
            "weight": incoherence_of({name: chain.weight for name, chain in chains.items()}, sample_nC),
        }
        release([weight_OC])
        stats.let_go(layer)
    return out
